"""How a chunk of prompts goes through the model: which prompts go together, and in which shapes.

Rule: a prompt's cache is a list of mlx-lm's caches throughout; what lies behind their offsets is nobody's.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.slots import Layers, SlotLayer, StepPositions, empty_layers, grow, slot_capacity
from mlxserver.engine.loading.metadata import attention_heads
from mlxserver.engine.platform import cpu_kernels
from mlxserver.engine.platform.attention_memory import AttentionMemory
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.sequence import Sequence

_ANSWER_ROOM = 64  # tokens that a prompt must have room for behind it, lest it should join only to wait again
# Tokens in a chunk where shapes have to recur. Fewer than 512 take little less time, but leave the GPU to others.
_LENGTHS = (256, 384, 512, 768, 1024, 1536, 2048)
_SHORT = 512  # only prompts this short go together
_MOST_TOGETHER = 4  # what joins together holds a step up, too
_SLACK = 1.25  # how much longer than wanted a chunk may be, lest a prompt's end be left over


@dataclass
class PendingPrompt:
    """A prompt that is not yet processed, and the rows that share it. `done` counts its tokens in the cache."""

    rows: list[Sequence]
    arrived: float
    started: float = 0.0
    cache: caches.Cache = field(default_factory=list)
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

    def drop(self, sequence_ids: set[int]) -> bool:
        """Drop rows; whether none is left."""
        self.rows = [row for row in self.rows if row.id not in sequence_ids]
        return not self.rows

    def next(self, most: int) -> list[int]:
        """Its next tokens, so many at the most."""
        return list(self.tokens[self.done : self.done + min(self.remaining, most)])


@dataclass(frozen=True)
class Chunk:
    """Prompts, and how many tokens of each at the most."""

    prompts: abc.Sequence[PendingPrompt]
    length: int


class PrefillStrategy(Protocol):
    """A way to process prompts. yields_cores: other models' steps go on during a chunk, however long it is."""

    yields_cores: bool

    def choose(self, waiting: abc.Sequence[PendingPrompt], budget: int) -> Chunk:
        """What to process next, for about so many tokens; the first of those that wait is always in it."""

    def run(self, chunk: Chunk, beside_others: bool = False) -> int:
        """Process it and give each prompt its longer cache; the number of tokens computed, padding included.

        beside_others: other models stream meanwhile.
        """

    def tokens_for(self, prompt: PendingPrompt) -> int:
        """Tokens that are held for a prompt while it is processed."""

    def warm_up(self) -> None:
        """Run the shapes that prompts use."""


def make_prefill_strategy(model: Any, policy: ExecutionPolicy | None = None) -> PrefillStrategy:
    """The way that is best for a model on this device."""
    policy = policy or current()
    recurs = policy.bucket_prefill and caches.is_plain(model)
    return BucketedPrefill(model, policy) if recurs else PlainPrefill(model, policy)


class PlainPrefill:
    """Chunks of any shape, in mlx-lm's own caches.

    Where a layer keeps a state, no chunk has padding: of mlx-lm's models, some let it change the state (nemotron_h,
    mamba, jamba, rwkv7 and others).
    """

    def __init__(self, model: Any, policy: ExecutionPolicy | None = None) -> None:
        policy = policy or current()
        self._model = model
        heads = attention_heads(vars(model.args)) if hasattr(model, "args") else 0
        self._attention = AttentionMemory(heads, policy)
        self._rounds = policy.round_chunks
        self._may_pad = not caches.keeps_state(model)
        self.yields_cores = policy.parallel_models

    def choose(self, waiting: abc.Sequence[PendingPrompt], budget: int) -> Chunk:
        """As many prompts as the budget holds, each padded to the longest; a little more than that, if it ends them.

        Without padding, only prompts that give the chunk as many tokens as the first one.
        """
        if self._rounds:
            budget = 1 << (budget.bit_length() - 1)
        most = self._attention.fit(int(_SLACK * budget), max(prompt.done for prompt in waiting))
        prompts: list[PendingPrompt] = []
        length = 0
        for prompt in waiting:
            own = prompt.remaining if prompt.remaining <= most else min(budget, most)
            if not self._may_pad and prompts and own != length:
                continue
            longest = max(length, own)
            if prompts and longest * (len(prompts) + 1) > most:
                break
            prompts.append(prompt)
            length = longest
        return Chunk(prompts, length)

    def run(self, chunk: Chunk, beside_others: bool = False) -> int:
        """Process the chunk."""
        with cpu_kernels.layer_by_layer(beside_others):
            return self._run_together(chunk) if len(chunk.prompts) > 1 else self._run_alone(chunk)

    def _run_alone(self, chunk: Chunk) -> int:
        prompt = chunk.prompts[0]  # in place: a long prompt's cache must not be copied for each of its chunks
        tokens = prompt.next(chunk.length)
        self._model(mx.array([tokens]), cache=prompt.cache)
        mx.eval([layer.state for layer in prompt.cache])
        prompt.done += len(tokens)
        return len(tokens)

    def tokens_for(self, prompt: PendingPrompt) -> int:
        """Its own tokens."""
        return len(prompt.tokens)

    def warm_up(self) -> None:
        """Any shape will do, and none has to be prepared."""

    def _run_together(self, chunk: Chunk) -> int:
        """One forward pass for several prompts, the shorter ones padded on the right."""
        cache = caches.merge([prompt.cache for prompt in chunk.prompts])
        tokens = [prompt.next(chunk.length) for prompt in chunk.prompts]
        lengths = [len(part) for part in tokens]
        longest = max(lengths)
        if min(lengths) < longest:
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=[longest - length for length in lengths])
        self._model(mx.array([part + [0] * (longest - len(part)) for part in tokens]), cache=cache)
        for layer in cache:
            layer.finalize()
        mx.eval([layer.state for layer in cache])
        for index, (prompt, length) in enumerate(zip(chunk.prompts, lengths, strict=True)):
            prompt.done += length
            prompt.cache = caches.extract(cache, index, prompt.done)
        return longest * len(lengths)


class BucketedPrefill:
    """Chunks of few shapes, padded on the right, in places of few lengths (kv_cache/slots.py)."""

    yields_cores = False

    def __init__(self, model: Any, policy: ExecutionPolicy | None = None) -> None:
        self._model = model
        self._nothing = empty_layers(model)
        self._forward = mx.compile(self._advance) if (policy or current()).compile_steps else self._advance

    def choose(self, waiting: abc.Sequence[PendingPrompt], budget: int) -> Chunk:
        """Short prompts together, as many as the budget holds, a power of two; or a long one alone."""
        first = waiting[0]
        most = max(_LENGTHS[0], budget)
        allowed = [length for length in _LENGTHS if length <= most]
        length = next((length for length in allowed if length >= first.remaining), allowed[-1])
        alike = [p for p in waiting if p.remaining <= length and self._span(p, length) == self._span(first, length)]
        if length > _SHORT or first.remaining > length:
            alike = [first]
        together = max(1, min(len(alike), most // length, _MOST_TOGETHER))
        return Chunk(alike[: 1 << (together.bit_length() - 1)], length)

    def run(self, chunk: Chunk, beside_others: bool = False) -> int:
        """Process the chunk."""
        span = max(self._span(prompt, chunk.length) for prompt in chunk.prompts)
        tokens = [prompt.next(chunk.length) for prompt in chunk.prompts]
        padded = mx.array([part + [0] * (chunk.length - len(part)) for part in tokens], dtype=mx.uint32)
        offsets = mx.array([prompt.done for prompt in chunk.prompts], dtype=mx.int32)
        keys, values = self._forward(padded, offsets, *self._places(chunk.prompts, span))
        mx.eval(keys, values)
        for place, (prompt, part) in enumerate(zip(chunk.prompts, tokens, strict=True)):
            prompt.done += len(part)
            for layer, layer_keys, layer_values in zip(prompt.cache, keys, values, strict=True):
                layer.keys, layer.values = layer_keys[place : place + 1], layer_values[place : place + 1]
                layer.offset = prompt.done
        return int(padded.size)

    def tokens_for(self, prompt: PendingPrompt) -> int:
        """A place that its tokens fit in, whatever of it is kept already, and the padding of its last chunk."""
        tokens = len(prompt.tokens)
        # Of a long chunk less than half is padding, or else a shorter one would do.
        return slot_capacity(tokens + min(max(_SHORT, tokens), _LENGTHS[-1] // 2), _SHORT)

    def warm_up(self) -> None:
        """Run short prompts, alone and together, and the first chunk of long ones."""
        together = [1 << power for power in range(_MOST_TOGETHER.bit_length())]
        shapes = [(count, length) for length in _LENGTHS for count in (together if length <= _SHORT else [1])]
        for count, length in shapes:
            places = (
                [grow(array, count, slot_capacity(length, _SHORT)) for array in arrays] for arrays in self._nothing
            )
            tokens, offsets = mx.zeros((count, length), dtype=mx.uint32), mx.zeros((count,), dtype=mx.int32)
            mx.eval(self._forward(tokens, offsets, *places))

    def _advance(self, tokens: mx.array, offsets: mx.array, keys: Layers, values: Layers) -> tuple[Layers, Layers]:
        """PrefillStrategy tokens, [places, tokens]; the longer keys and values."""
        places, _, span, _ = keys[0].shape
        step = StepPositions(offsets, places, span)
        cache = [SlotLayer(k, v, step) for k, v in zip(keys, values, strict=True)]
        self._model(tokens, cache=cache)
        return [place.keys for place in cache], [place.values for place in cache]

    def _places(self, prompts: abc.Sequence[PendingPrompt], span: int) -> tuple[Layers, Layers]:
        """What the prompts have so far, in places of one length. Their caches lose it: the chunk is written in place
        only where nobody else holds it, and would be there twice.
        """
        held: list[tuple[Layers, Layers]] = []
        for prompt in prompts:
            own = [layer.keys for layer in prompt.cache], [layer.values for layer in prompt.cache]
            held.append(own if prompt.done else self._nothing)
            for layer in prompt.cache:
                layer.keys = layer.values = None
        keys, values = (_side_by_side([own[part] for own in held], span) for part in (0, 1))
        return keys, values

    def _span(self, prompt: PendingPrompt, length: int) -> int:
        """Length of the place that a prompt needs while a chunk of so many tokens is written."""
        return slot_capacity(max(len(prompt.tokens), prompt.done + length), _SHORT)


def _side_by_side(rows: abc.Sequence[Layers], span: int) -> Layers:
    """Layers of several rows, each [1 or none, heads, tokens, dim], in places of one length."""
    layers = zip(*rows, strict=True)
    return [mx.concatenate([grow(array, 1, span)[:, :, :span] for array in layer]) for layer in layers]
