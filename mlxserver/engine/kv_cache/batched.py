"""KV cache of the sequences that decode together, and the step that advances them.

Rule 1: sequences have the order of the decode batch; row i of the logits belongs to sequence i.
Rule 2: every sequence has a slot, with capacity for the longest, so that a step writes one token per sequence and
        copies nothing, and shapes change seldom. A compiled step needs that. The last sequence takes the slot of one
        that leaves.
Rule 3: models with other layers than plain ones use mlx-lm's own batched caches instead (kv_cache/merged.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

from mlxserver.engine.mlx import mx

from mlx_lm.models.cache import KVCache

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.merged import MergedCache
from mlxserver.engine.kv_cache.single import SingleCache
from mlxserver.engine.kv_cache.slots import Layers, SlotLayer, StepPositions, empty_layers, grow, slot_capacity
from mlxserver.engine.platform.policy import ExecutionPolicy, current

_CAPACITY_STEP = 256  # tokens by which slots grow at first, and a quarter of their capacity later


class BatchCache(Protocol):
    """KV cache of a decode batch."""

    def join(self, joining: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add sequences, each with its own cache, behind the present ones. coming: how many more are soon to join."""

    def keep(self, order: Sequence[int]) -> None:
        """Keep only the sequences at these indices, in this order; at least one. None may move towards the end."""

    def clear(self) -> None:
        """Drop all sequences."""

    def extract(self, index: int) -> caches.Cache:
        """A copy of a sequence's cache."""

    def advance(self, inputs: mx.array) -> mx.array:
        """Compute one token per sequence, [batch] -> logits [batch, vocab]. Nothing is evaluated."""

    def tokens_for(self, batch: int, longest: int) -> int:
        """Tokens of KV cache of so many sequences, the longest of so many tokens; unused capacity included."""

    def compact(self) -> None:
        """Give back slots and capacity that the present sequences do not need."""


def make_batch_cache(model: Any, policy: ExecutionPolicy | None = None) -> BatchCache:
    """An empty cache for a model's decode batch."""
    policy = policy or current()
    if policy.batch_cache == "single":
        return SingleCache(model)
    if policy.batch_cache == "slots" and caches.is_plain(model):
        return SlotCache(model, policy)
    return MergedCache(model)


class SlotCache:
    """Slots of plain keys and values, [slots, heads, capacity, dim] per layer, unused behind the last sequence."""

    def __init__(self, model: Any, policy: ExecutionPolicy | None = None) -> None:
        policy = policy or current()
        self._model = model
        self._is_padded = policy.pad_slots
        self._is_compiled = policy.compile_steps
        self._step = mx.compile(self._forward) if self._is_compiled else self._forward
        self._put = mx.compile(_put) if self._is_compiled else _put
        self._empty = empty_layers(model)
        self.clear()

    def clear(self) -> None:
        """Drop all sequences. Compiled functions stay."""
        self._keys, self._values = self._empty
        self._lengths: list[int] = []
        self._offsets = mx.zeros((0,), dtype=mx.int32)

    def join(self, joining: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add sequences behind the present ones; slots are made for those that come, too."""
        slot = len(self._lengths)
        self._lengths += [cache[0].offset for cache in joining]
        self._grow(self._slots_for(len(self._lengths) + coming), self._capacity_for(max(self._lengths) + 1))
        for group in self._groups(joining):
            at = mx.array([slot], dtype=mx.int32)
            self._keys, self._values = self._put(at, self._keys, self._values, *zip(*group, strict=True))
            slot += len(group)
        self._set_offsets()

    def _groups(self, joining: Sequence[caches.Cache]) -> Iterator[list[tuple[Layers, Layers]]]:
        """Keys and values of the sequences; those of one length together if that saves a GPU work, in few numbers."""
        for _, alike in groupby(map(self._own, joining), lambda own: own[0][0].shape[2]):
            group = list(alike)
            while group:
                count = 1 << (len(group).bit_length() - 1) if self._is_compiled else 1
                yield group[:count]
                group = group[count:]

    def _own(self, cache: caches.Cache) -> tuple[Layers, Layers]:
        """Keys and values of a sequence, of one token at least, and no longer than a slot."""
        if not (length := cache[0].offset):
            keys, values = ([grow(array, 1, 1) for array in arrays] for arrays in self._empty)
            return keys, values
        end = int(self._keys[0].shape[2]) if self._is_compiled else length
        return [layer.keys[:, :, :end] for layer in cache], [layer.values[:, :, :end] for layer in cache]

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._lengths = [self._lengths[index] for index in order]
        self._move([(slot, former) for slot, former in enumerate(order) if slot != former])
        slots = self._slots_for(len(order))
        if slots < self._keys[0].shape[0]:
            self._keys = [mx.contiguous(keys[:slots]) for keys in self._keys]
            self._values = [mx.contiguous(values[:slots]) for values in self._values]
        self._set_offsets()

    def _move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Move sequences to other slots: (to, from) pairs."""
        if not moves:
            return
        taken = mx.array([former for _, former in moves], dtype=mx.uint32)
        keys, values = [array[taken] for array in self._keys], [array[taken] for array in self._values]
        mx.eval(keys, values)  # or else an array that is written to would also be read from, and be copied whole
        for moved, (slot, _) in enumerate(moves):
            for array, copies in zip((*self._keys, *self._values), (*keys, *values), strict=True):
                array[slot] = copies[moved]

    def extract(self, index: int) -> caches.Cache:
        """A copy of a sequence's keys and values."""
        length = self._lengths[index]
        cache = []
        for keys, values in zip(self._keys, self._values, strict=True):
            layer = KVCache()
            layer.keys = mx.contiguous(keys[index : index + 1, :, :length])
            layer.values = mx.contiguous(values[index : index + 1, :, :length])
            layer.offset = length
            cache.append(layer)
        return cache

    def advance(self, inputs: mx.array) -> mx.array:
        """Compute one token per sequence."""
        batch = len(self._lengths)
        self._ensure_capacity(max(self._lengths) + 1)
        if self._is_padded:
            inputs = mx.pad(inputs, (0, self._offsets.shape[0] - batch))
        logits, self._offsets, self._keys, self._values = self._step(inputs, self._offsets, self._keys, self._values)
        self._lengths = [length + 1 for length in self._lengths]
        return logits[:batch]

    def tokens_for(self, batch: int, longest: int) -> int:
        """Tokens that the slots of such a batch hold."""
        return max(self._slots_for(batch), int(self._keys[0].shape[0])) * self._capacity_for(longest)

    def compact(self) -> None:
        """Give back slots and capacity that the present sequences do not need."""
        batch, present = max(1, len(self._lengths)), (int(self._keys[0].shape[0]), int(self._keys[0].shape[2]))
        slots = min(1 << (batch - 1).bit_length(), present[0])
        capacity = min(slot_capacity(max(self._lengths, default=0) + 1, _CAPACITY_STEP), present[1])
        if (slots, capacity) == present:
            return
        for arrays in (self._keys, self._values):
            for n in range(len(arrays)):  # one by one, so that only one exists twice
                arrays[n] = mx.contiguous(arrays[n][:slots, :, :capacity])
                mx.eval(arrays[n])
        self._set_offsets()

    def _forward(
        self, inputs: mx.array, offsets: mx.array, keys: list[mx.array], values: list[mx.array]
    ) -> tuple[mx.array, mx.array, list[mx.array], list[mx.array]]:
        # A CPU's time grows with every slot computed and token attended to; a GPU is better off with shapes that recur.
        visible = keys[0].shape[2] if self._is_padded else max(self._lengths) + 1
        step = StepPositions(offsets, inputs.shape[0], visible)
        cache = [SlotLayer(k, v, step) for k, v in zip(keys, values, strict=True)]
        logits = self._model(inputs[:, None], cache=cache)[:, -1, :]
        return logits, offsets + 1, [layer.keys for layer in cache], [layer.values for layer in cache]

    def _ensure_capacity(self, length: int) -> None:
        """Grow the slots to at least `length` tokens."""
        self._grow(0, self._capacity_for(length))

    def _grow(self, slots: int, capacity: int) -> None:
        self._keys = [grow(keys, slots, capacity) for keys in self._keys]
        self._values = [grow(values, slots, capacity) for values in self._values]

    def _capacity_for(self, length: int) -> int:
        """Capacity to have for a sequence of so many tokens, without shrinking."""
        return max(int(self._keys[0].shape[2]), slot_capacity(length, _CAPACITY_STEP))

    def _slots_for(self, batch: int) -> int:
        """Slots to have: the next power of two, without shrinking for a few."""
        needed, present = 1 << (batch - 1).bit_length(), int(self._keys[0].shape[0])
        return present if needed <= present < 4 * needed else needed

    def _set_offsets(self) -> None:
        unused = self._keys[0].shape[0] - len(self._lengths)
        self._offsets = mx.array(self._lengths + [0] * unused, dtype=mx.int32)


def _put(
    at: mx.array, keys: Layers, values: Layers, own_keys: Sequence[Layers], own_values: Sequence[Layers]
) -> tuple[Layers, Layers]:
    """Keys and values with those of sequences, [1, heads, tokens, dim] per layer, in the slots from `at` [1] on."""
    return (
        [_put_array(array, mx.concatenate(own), at) for array, *own in zip(keys, *own_keys, strict=True)],
        [_put_array(array, mx.concatenate(own), at) for array, *own in zip(values, *own_values, strict=True)],
    )


def _put_array(array: mx.array, own: mx.array, at: mx.array) -> mx.array:
    """The array with the sequences in their slots, and zeros behind their tokens.

    Values there get a weight of 0, and 0 times the inf or NaN that an overflow left would be NaN.
    """
    if own.shape[2] < array.shape[2]:
        zeros = mx.broadcast_to(mx.zeros((), dtype=array.dtype), (own.shape[0], *array.shape[1:]))
        array = mx.slice_update(array, zeros, at, [0])
    return mx.slice_update(array, own, at, [0])
