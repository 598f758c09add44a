"""Continuous batching: rows join and leave a running batch at every step.

Rule 1: a row joins with its last prompt token as input, so that its first token comes out of the step that advances
        everybody else. Nobody waits for a separate first step.
Rule 2: a step is launched before the tokens of the one before it are read: the device works while Python publishes.
Rule 3: prompts are processed in chunks between steps. A chunk takes no longer than the stall target while anybody
        streams; its size in tokens follows the measured speed.
Rule 4: the prompt served first is the one that would be done first had it started at its arrival. Short prompts pass
        a long one, and the long one still ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from engine import kv
from engine.rows import Rows, make_rows
from engine.sampling import BatchSampler
from engine.types import Row, RowToken

# Tokens in a chunk: never fewer, so that a slow machine gets on; never more, so that a fast one stays responsive.
_SMALLEST_CHUNK = 16
_LARGEST_CHUNK = 2048
# With nobody streaming there is nothing to stall; only cancels and newcomers wait.
_IDLE_STALL_FACTOR = 4
_ASSUMED_SPEED = 1000.0  # prompt tokens a second, until measured
_SPEED_WEIGHT = 0.3  # of a new measurement in the running average


@dataclass
class _Prompt:
    """A row whose prompt is not yet processed. `done` counts its tokens that are in the cache."""

    row: Row
    cache: kv.Cache
    done: int
    arrived: float
    cached_tokens: int = 0

    @property
    def remaining(self) -> int:
        """Tokens still to process; the last one is left for the first decode step."""
        return len(self.row.tokens) - 1 - self.done


@dataclass
class _Decoding:
    """A row that generates. `tokens` are those that were fed: what its keys and values hold."""

    row: Row
    cached_tokens: int
    tokens: list[int] = field(default_factory=list)
    launched: int = 0  # tokens sampled for it, read or not
    is_fresh: bool = True  # its input is still the last prompt token, which is not for publishing


class Batcher:
    """The batch of one model. All calls on one thread, inside that thread's MLX stream.

    stall_target is in seconds. `is_anybody_streaming` tells whether another model's streams would feel a long chunk.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_running: int = 32,
        stall_target: float = 0.25,
        prefix_cache: kv.PrefixCache | None = None,
        is_anybody_streaming: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model = model
        self._max_running = max_running
        self._stall_target = stall_target
        self._prefix_cache = prefix_cache
        self._is_anybody_streaming = is_anybody_streaming
        self.vocab_size: int = model(mx.zeros((1, 1), dtype=mx.uint32)).shape[-1]  # lazy: nothing is computed
        self._prompts: list[_Prompt] = []
        self._waiting: list[tuple[float, Row]] = []
        self._rows: list[_Decoding]
        self._places: Rows
        self._sampler: BatchSampler
        self._inputs: mx.array
        self._reset_decoding()
        self.prefill_speed = _ASSUMED_SPEED

    # -- the Batch protocol -------------------------------------------------------------------------------------

    def insert(self, row: Row) -> None:
        """Queue a row; it joins at one of the next steps. A prompt has at least one token."""
        self._waiting.append((time.monotonic(), row))

    def remove(self, row_ids: Sequence[int]) -> None:
        """Forget rows, wherever they are; what was computed for them goes to the prefix cache."""
        gone = set(row_ids)
        self._waiting = [entry for entry in self._waiting if entry[1].id not in gone]
        for prompt in [p for p in self._prompts if p.row.id in gone]:
            self._prompts.remove(prompt)
            self._keep_prefix(prompt.row.tokens[: prompt.done], prompt.cache)
        leaving = [index for index, row in enumerate(self._rows) if row.row.id in gone]
        if leaving:
            self._leave(leaving)

    def decode(self) -> list[RowToken]:
        """Launch one step for every decoding row and return the tokens of the step before."""
        if not self._rows:
            return []
        inputs = self._inputs
        is_launched = any(row.launched < row.row.max_tokens for row in self._rows)
        if is_launched:
            self._launch(inputs)
        published = []
        tokens = cast(list[int], inputs.tolist())
        for row, token in zip(self._rows, tokens, strict=True):
            if is_launched:
                row.tokens.append(token)
            if not row.is_fresh:
                published.append(RowToken(row.row.id, token, row.cached_tokens))
            row.is_fresh = False
        return published

    def prefill(self) -> None:
        """Process one chunk of the waiting prompts and let those that are ready join the batch."""
        self._admit()
        if any(prompt.remaining for prompt in self._prompts):
            self._process(self._choose_chunk())
        if ready := [prompt for prompt in self._prompts if not prompt.remaining]:
            self._join(ready)

    def is_empty(self) -> bool:
        """Whether no row is waiting or decoding."""
        return not (self._rows or self._prompts or self._waiting)

    def is_streaming(self) -> bool:
        """Whether rows are decoding, which a long chunk would hold up."""
        return bool(self._rows)

    def close(self) -> None:
        """Free what the batch holds."""
        self._waiting, self._prompts = [], []
        self._reset_decoding()
        self.shrink_prefixes(0)

    def shrink_prefixes(self, max_bytes: int) -> None:
        """Give the least recently used prefixes back until at most this many bytes are kept."""
        if self._prefix_cache:
            self._prefix_cache.shrink(max_bytes)

    # -- decoding -----------------------------------------------------------------------------------------------

    def _launch(self, inputs: mx.array) -> None:
        """Start the step that feeds these tokens, one a row; the tokens it samples are the next inputs."""
        self._inputs = self._sampler(self._places.advance(inputs))
        mx.async_eval(self._inputs)  # type: ignore[no-untyped-call]
        for row in self._rows:
            row.launched += 1

    def _reset_decoding(self) -> None:
        self._rows = []
        self._places = make_rows(self._model)
        self._inputs = mx.zeros((0,), dtype=mx.uint32)
        self._sampler = BatchSampler(self.vocab_size)

    def _leave(self, leaving: list[int]) -> None:
        """Take rows out of the decode batch."""
        for index in leaving:
            row = self._rows[index]
            if self._prefix_cache and len(row.tokens) > 0:
                self._keep_prefix([*row.row.tokens[:-1], *row.tokens], self._places.extract(index))
        keep = [index for index in range(len(self._rows)) if index not in set(leaving)]
        self._rows = [self._rows[index] for index in keep]
        if not keep:
            self._reset_decoding()
            return
        self._places.keep(keep)
        self._inputs = self._inputs[mx.array(keep, dtype=mx.uint32)]
        self._sampler.filter(keep)

    # -- prompts ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give waiting rows a place while there is one."""
        while self._waiting and len(self._rows) + len(self._prompts) < self._max_running:
            arrived, row = self._waiting.pop(0)
            cache, length = self._prefix_cache.fetch(row.tokens) if self._prefix_cache else (None, 0)
            self._prompts.append(_Prompt(row, cache or kv.new_cache(self._model), length, arrived, length))

    def _choose_chunk(self) -> list[tuple[_Prompt, list[int]]]:
        """The prompts to work on and the tokens of each, within the budget (rules 3 and 4)."""
        is_heard = bool(self._rows) or self._is_anybody_streaming()
        seconds = self._stall_target * (1 if is_heard else _IDLE_STALL_FACTOR)
        budget = int(min(max(self.prefill_speed * seconds, _SMALLEST_CHUNK), _LARGEST_CHUNK))
        first, *others = sorted(
            (prompt for prompt in self._prompts if prompt.remaining),
            key=lambda prompt: prompt.arrived + prompt.remaining / self.prefill_speed,
        )
        length = min(first.remaining, budget)
        chunk = [first]
        for prompt in others:
            # Rows of one forward pass are padded to the longest: the padding counts.
            longest = max(length, min(prompt.remaining, budget))
            if longest * (len(chunk) + 1) > budget:
                break
            chunk.append(prompt)
            length = longest
        return [(p, list(p.row.tokens[p.done : p.done + min(p.remaining, length)])) for p in chunk]

    def _process(self, chunk: list[tuple[_Prompt, list[int]]]) -> None:
        """Run the chunk through the model and give each prompt its longer cache."""
        cache = kv.merge([prompt.cache for prompt, _ in chunk])
        lengths = [len(tokens) for _, tokens in chunk]
        longest = max(lengths)
        if min(lengths) < longest:
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=[longest - length for length in lengths])
        inputs = mx.array([tokens + [0] * (longest - len(tokens)) for _, tokens in chunk])
        mx.eval(self._inputs)  # the step that runs already must not count as the chunk's time
        started = time.monotonic()
        self._model(inputs, cache=cache)
        for layer in cache:
            layer.finalize()
        mx.eval([layer.state for layer in cache])
        self._measure(sum(lengths), time.monotonic() - started)
        for index, (prompt, tokens) in enumerate(chunk):
            prompt.done += len(tokens)
            prompt.cache = kv.extract(cache, index, prompt.done)

    def _measure(self, tokens: int, seconds: float) -> None:
        if tokens >= _SMALLEST_CHUNK and seconds > 0:
            self.prefill_speed += _SPEED_WEIGHT * (tokens / seconds - self.prefill_speed)

    def _join(self, ready: list[_Prompt]) -> None:
        """Move prompts that are done into the decode batch."""
        for prompt in ready:
            self._prompts.remove(prompt)
        self._places.join([prompt.cache for prompt in ready])
        last_tokens = mx.array([prompt.row.tokens[-1] for prompt in ready], dtype=mx.uint32)
        self._inputs = mx.concatenate([self._inputs, last_tokens])
        self._sampler.extend([prompt.row for prompt in ready])
        self._rows += [_Decoding(prompt.row, prompt.cached_tokens) for prompt in ready]

    def _keep_prefix(self, tokens: Sequence[int], cache: kv.Cache) -> None:
        if self._prefix_cache:
            self._prefix_cache.store(tokens, cache)
