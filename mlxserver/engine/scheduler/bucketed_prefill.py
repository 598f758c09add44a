"""Prefill in chunks of few shapes, in slots of few capacities (kv_cache/slots.py)."""

from __future__ import annotations

from collections import abc
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache.slots import (
    Layers,
    StepPositions,
    empty_layers,
    fill,
    flat_arrays,
    grow,
    slot_capacity,
    slot_layers,
)
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.scheduler.chunks import (
    SCORED,
    Chunk,
    LaunchedChunk,
    attention_memory,
    may_share,
    measure_chunk,
    record_chunk,
)
from mlxserver.engine.scheduler.plain_prefill import PlainPrefill
from mlxserver.engine.scheduler.prompts import PendingPrompt

# Tokens of a chunk where shapes have to recur. Fewer than 512 take little less time, but leave the GPU to other models.
_LENGTHS = (256, 384, 512, 768, 1024, 1536, 2048)
_SHORT = 512  # longest prompts that share a chunk
_MOST_TOGETHER = 4  # prompts of a chunk: joining the decode batch delays a step, too


class BucketedPrefill:
    """Chunks of few shapes, padded on the right, in slots of few capacities (kv_cache/slots.py).

    Prompts with images have chunks of any shape: they are few, and where their images stand differs.
    """

    yields_cores = False

    def __init__(self, model: Any, policy: ExecutionPolicy | None = None) -> None:
        self._model = model
        self._seeing = PlainPrefill(model, policy)
        self._empty = empty_layers(model)
        policy = policy or current()
        self._attention = attention_memory(model, policy)
        self._evaluate: Any = mx.async_eval if policy.async_chunks else mx.eval
        is_compiled = policy.compile_steps
        self._forward = mx.compile(self._advance) if is_compiled else self._advance
        self._scoring_forward = mx.compile(self._advance_scored) if is_compiled else self._advance_scored

    def choose(self, waiting: abc.Sequence[PendingPrompt], budget: int) -> Chunk:
        """Short prompts together, as many as the budget holds, a power of two; or one long prompt."""
        first = waiting[0]
        if first.images:
            return self._seeing.choose(waiting, budget)
        waiting = may_share(waiting)
        most = max(_LENGTHS[0], budget)
        allowed = [length for length in _LENGTHS if length <= most]
        length = next((length for length in allowed if length >= first.remaining), allowed[-1])
        capacity = self._capacity(first, length)
        alike = [p for p in waiting if p.remaining <= length and self._capacity(p, length) == capacity]
        if length > _SHORT or first.remaining > length:
            alike = [first]
        together = max(1, min(len(alike), most // length, _MOST_TOGETHER))
        return Chunk(alike[: 1 << (together.bit_length() - 1)], length)

    def run(self, chunk: Chunk, beside_peers: bool = False) -> LaunchedChunk:
        """Process the chunk."""
        if chunk.prompts[0].images:
            return self._seeing.run(chunk, beside_peers)
        keys, values = self._forward(*self._inputs(chunk))
        self._evaluate(keys, values)
        for slot, prompt in enumerate(chunk.prompts):
            prompt.done += len(prompt.next(chunk.length))
            _give_back(prompt, keys, values, slot)
        return LaunchedChunk(len(chunk.prompts) * chunk.length, values[-1])

    def score(self, prompt: PendingPrompt, budget: int, beside_peers: bool = False) -> None:
        """Process the next tokens of the prompt, in one shape."""
        if prompt.images:
            self._seeing.score(prompt, budget, beside_peers)
            return
        count = len(prompt.next(SCORED))
        keys, values, logits = self._scoring_forward(*self._inputs(Chunk([prompt], SCORED)))
        measured = measure_chunk(prompt, logits, SCORED)
        mx.eval(keys, values, measured)
        record_chunk(prompt, measured, count)
        _give_back(prompt, keys, values, 0)

    def tokens_for(self, length: int) -> int:
        """Capacity of a slot for its tokens, wherever its chunks begin, and for the padding of the last one."""
        # Less than half of a long chunk is padding, or else a shorter one would do.
        return slot_capacity(length + min(max(_SHORT, length), _LENGTHS[-1] // 2), _SHORT)

    def bytes_beyond(self, length: int) -> int:
        """Dequantised keys and values of a long prompt. A GPU does not write the scores out."""
        return self._attention.bytes_beyond(self.tokens_for(length))

    def shapes(self, length: int) -> abc.Sequence[tuple[int, int, int]]:
        """Short prompts alone and together; of a long one, its first chunks and what may be left at its end."""
        together = [1 << power for power in range(_MOST_TOGETHER.bit_length())]
        capacity = slot_capacity(length, _SHORT)
        lengths = sorted((own for own in _LENGTHS if own <= capacity), reverse=length > _SHORT)
        return [(count, own, capacity) for own in lengths for count in (together if capacity <= _SHORT else [1])]

    def rehearse(self, prompts: int, tokens: int, capacity: int) -> None:
        """Compute a chunk of such a shape, at the end of its slots."""
        slots = ([grow(array, prompts, capacity) for array in arrays] for arrays in self._empty)
        offsets = mx.full((prompts,), capacity - tokens, dtype=mx.int32)
        mx.eval(self._forward(mx.zeros((prompts, tokens), dtype=mx.uint32), offsets, *slots))

    def _advance(self, tokens: mx.array, offsets: mx.array, keys: Layers, values: Layers) -> tuple[Layers, Layers]:
        """Forward pass of tokens, [slots, tokens]. Returns the keys and values with them written, per layer."""
        keys, values, _ = self._advance_scored(tokens, offsets, keys, values)
        return keys, values

    def _advance_scored(
        self, tokens: mx.array, offsets: mx.array, keys: Layers, values: Layers
    ) -> tuple[Layers, Layers, mx.array]:
        """As _advance(), with the logits, [slots, tokens, vocab]."""
        slots, _, capacity, _ = keys[0].shape
        step = StepPositions(offsets, slots, capacity)
        cache = slot_layers(keys, values, step)
        logits = self._model(tokens, cache=cache)
        return *flat_arrays(cache), logits

    def _inputs(self, chunk: Chunk) -> tuple[mx.array, mx.array, Layers, Layers]:
        """The chunk's tokens, padded, their offsets, and the prompts' slots."""
        capacity = max(self._capacity(prompt, chunk.length) for prompt in chunk.prompts)
        tokens = [prompt.next(chunk.length) for prompt in chunk.prompts]
        padded = mx.array([part + [0] * (chunk.length - len(part)) for part in tokens], dtype=mx.uint32)
        offsets = mx.array([prompt.done for prompt in chunk.prompts], dtype=mx.int32)
        return padded, offsets, *self._take_slots(chunk.prompts, capacity)

    def _take_slots(self, prompts: abc.Sequence[PendingPrompt], capacity: int) -> tuple[Layers, Layers]:
        """The prompts' KV caches in slots of one capacity. The prompts lose them: MLX writes a chunk in place only if
        no other reference is left, and would copy the arrays otherwise.
        """
        taken: list[tuple[Layers, Layers]] = []
        for prompt in prompts:
            taken.append(flat_arrays(prompt.cache) if prompt.done else self._empty)
            for layer in prompt.cache:
                layer.keys = layer.values = None
        keys, values = (_side_by_side([own[part] for own in taken], capacity) for part in (0, 1))
        return keys, values

    def _capacity(self, prompt: PendingPrompt, length: int) -> int:
        """Capacity of the slot that a prompt needs for a chunk of so many tokens."""
        return slot_capacity(max(len(prompt.tokens), prompt.done + length), _SHORT)


def _give_back(prompt: PendingPrompt, keys: Layers, values: Layers, slot: int) -> None:
    """Give a prompt the KV cache of its slot."""
    own_keys, own_values = ([array[slot : slot + 1] for array in arrays] for arrays in (keys, values))
    fill(prompt.cache, own_keys, own_values, prompt.done)


def _side_by_side(prompts: abc.Sequence[Layers], capacity: int) -> Layers:
    """Layers of several prompts, each [1 or none, heads, tokens, dim], in slots of one capacity."""
    layers = zip(*prompts, strict=True)
    return [mx.concatenate([grow(array, 1, capacity)[:, :, :capacity] for array in layer]) for layer in layers]
