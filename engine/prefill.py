"""Prompts become keys and values, in chunks between the decode steps.

Rule 1: while anybody streams, a chunk takes about as long as a step or two, and never longer than the stall target.
        Its size in tokens follows the measured speed.
Rule 2: the prompt served first is the one that would be done first had it started at its arrival. Short prompts pass
        a long one, and the long one still ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from engine import kv
from engine.types import Row

# Tokens in a chunk: never fewer, so that a slow machine gets on; never more, so that a fast one stays responsive.
_SMALLEST_CHUNK = 16
_STEPS_A_CHUNK = 1.5  # decode steps that a chunk may take the time of: streams slow down, and none stands still
_LARGEST_CHUNK = 2048
# With nobody streaming there is nothing to stall; only cancels and newcomers wait.
_IDLE_STALL_FACTOR = 4
_ASSUMED_SPEED = 1000.0  # prompt tokens a second, until measured
_SPEED_WEIGHT = 0.3  # of a new measurement in the running average
_ANSWER_ROOM = 64  # tokens that a prompt must have room for behind it, lest it should join only to wait again


@dataclass
class Prompt:
    """A prompt that is not yet processed, and the rows that share it. `done` counts its tokens in the cache."""

    rows: list[Row]
    arrived: float
    started: float = 0.0
    cache: kv.Cache = field(default_factory=list)
    done: int = 0
    cached_tokens: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """All of it."""
        return self.rows[0].tokens

    @property
    def remaining(self) -> int:
        """Tokens still to process; the last one is left for the first decode step."""
        return len(self.tokens) - 1 - self.done

    @property
    def length(self) -> int:
        """Tokens that it needs room for: its own, and the beginning of an answer."""
        return len(self.tokens) + min(_ANSWER_ROOM, self.rows[0].max_tokens)

    def drop(self, row_ids: set[int]) -> bool:
        """Drop rows; whether none is left."""
        self.rows = [row for row in self.rows if row.id not in row_ids]
        return not self.rows


class Prefill:
    """Processes prompts on one model. stall_target is in seconds; `speed` is in prompt tokens a second, as measured."""

    def __init__(self, model: Any, stall_target: float) -> None:
        self._model = model
        self._stall_target = stall_target
        self.speed = _ASSUMED_SPEED

    def advance(self, prompts: Sequence[Prompt], *, step: float, running: mx.array) -> None:
        """Process one chunk of these prompts.

        step: seconds that a step of those who stream takes, 0 while nobody does. running: the step under way, if any.
        """
        waiting = [prompt for prompt in prompts if prompt.remaining]
        if not waiting:
            return
        seconds = min(self._stall_target, _STEPS_A_CHUNK * step) if step else _IDLE_STALL_FACTOR * self._stall_target
        chunk = self._choose(waiting, seconds)
        mx.eval(running)  # it must not count as the chunk's time
        self._process(chunk)

    def _choose(self, waiting: Sequence[Prompt], seconds: float) -> list[tuple[Prompt, list[int]]]:
        """The prompts to work on and the tokens of each, for about so many seconds."""
        budget = int(min(max(self.speed * seconds, _SMALLEST_CHUNK), _LARGEST_CHUNK))
        budget = 1 << (budget.bit_length() - 1)  # few sizes: on a GPU each new shape costs up to seconds
        first, *others = sorted(
            waiting,
            key=lambda prompt: prompt.arrived + prompt.remaining / self.speed,
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
        return [(p, list(p.tokens[p.done : p.done + min(p.remaining, length)])) for p in chunk]

    def _process(self, chunk: list[tuple[Prompt, list[int]]]) -> None:
        """Run the chunk through the model and give each prompt its longer cache."""
        started = time.monotonic()
        if len(chunk) == 1:  # in place: a long prompt's cache must not be copied for each of its chunks
            prompt, tokens = chunk[0]
            self._model(mx.array([tokens]), cache=prompt.cache)
            mx.eval([layer.state for layer in prompt.cache])
        else:
            self._process_together(chunk)
        self._measure(sum(len(tokens) for _, tokens in chunk), time.monotonic() - started)
        for prompt, tokens in chunk:
            prompt.done += len(tokens)

    def _process_together(self, chunk: list[tuple[Prompt, list[int]]]) -> None:
        """One forward pass for several prompts, the shorter ones padded on the right."""
        cache = kv.merge([prompt.cache for prompt, _ in chunk])
        lengths = [len(tokens) for _, tokens in chunk]
        longest = max(lengths)
        if min(lengths) < longest:
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=[longest - length for length in lengths])
        self._model(mx.array([tokens + [0] * (longest - len(tokens)) for _, tokens in chunk]), cache=cache)
        for layer in cache:
            layer.finalize()
        mx.eval([layer.state for layer in cache])
        for index, (prompt, tokens) in enumerate(chunk):
            prompt.cache = kv.extract(cache, index, prompt.done + len(tokens))

    def _measure(self, tokens: int, seconds: float) -> None:
        if tokens >= _SMALLEST_CHUNK and seconds > 0:
            self.speed += _SPEED_WEIGHT * (tokens / seconds - self.speed)
