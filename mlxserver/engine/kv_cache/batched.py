"""The keys and values of the rows that decode together, and the step that advances them.

Rule 1: rows stand in the order in which the batcher has them; row i of the logits is row i of the batch.
Rule 2: every row has a place, long enough for all, so that a step writes one token a row and copies nothing, and
        shapes change seldom. That is what makes a compiled step possible. A row that leaves is replaced by the last.
Rule 3: models with other caches (sliding windows, recurrent states) use mlx-lm's own batched caches instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

from mlxserver.engine.mlx import mx

from mlx_lm.models.cache import KVCache

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.slots import Layers, SlotLayer, StepPositions, empty_layers, grow, slot_capacity
from mlxserver.engine.platform.policy import ExecutionPolicy, current

_SPAN_STEP = 256  # tokens by which places grow at first, and a quarter of their length later


class BatchCache(Protocol):
    """What the batcher needs of the decoding rows."""

    def join(self, caches: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add rows, each with its own cache, behind the present ones. coming: how many more are soon to join."""

    def keep(self, order: Sequence[int]) -> None:
        """Keep only the rows at these indices, in this order; at least one. A row may only move towards the front."""

    def clear(self) -> None:
        """Drop all rows."""

    def extract(self, index: int) -> caches.Cache:
        """A row's own cache: a copy of its keys and values."""

    def advance(self, inputs: mx.array) -> mx.array:
        """PrefillStrategy one token a row, [rows] -> logits [rows, vocab]. Nothing is evaluated."""

    def tokens_for(self, rows: int, longest: int) -> int:
        """Tokens that are held when there are so many rows, the longest of so many tokens; the unused room included."""

    def compact(self) -> None:
        """Give room back that the present rows do not need."""


def make_batch_cache(model: Any, policy: ExecutionPolicy | None = None) -> BatchCache:
    """The rows of a model, empty."""
    if caches.is_plain(model):
        return SlotCache(model, policy)
    return MergedCache(model)


class SlotCache:
    """Slots of plain keys and values, [slots, heads, capacity, dim] per layer. Slots behind the last row are unused."""

    def __init__(self, model: Any, policy: ExecutionPolicy | None = None) -> None:
        policy = policy or current()
        self._model = model
        self._is_padded = policy.pad_slots
        self._is_compiled = policy.compile_steps
        self._step = mx.compile(self._forward) if self._is_compiled else self._forward
        self._put = mx.compile(_put) if self._is_compiled else _put
        self._nothing = empty_layers(model)
        self.clear()

    def clear(self) -> None:
        """Drop all rows. What was compiled stays."""
        self._keys, self._values = self._nothing
        self._lengths: list[int] = []
        self._offsets = mx.zeros((0,), dtype=mx.int32)

    def join(self, caches: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add rows behind the present ones; places are made for those who come, too."""
        place = len(self._lengths)
        self._lengths += [cache[0].offset for cache in caches]
        self._grow(self._slots_for(len(self._lengths) + coming), self._capacity_for(max(self._lengths) + 1))
        for rows in self._groups(caches):
            at = mx.array([place], dtype=mx.int32)
            self._keys, self._values = self._put(at, self._keys, self._values, *zip(*rows, strict=True))
            place += len(rows)
        self._set_offsets()

    def _groups(self, caches: Sequence[caches.Cache]) -> Iterator[list[tuple[Layers, Layers]]]:
        """The rows' keys and values. Those of one length together, if that saves a GPU work; a few numbers recur."""
        for _, alike in groupby(map(self._own, caches), lambda own: own[0][0].shape[2]):
            rows = list(alike)
            while rows:
                count = 1 << (len(rows).bit_length() - 1) if self._is_compiled else 1
                yield rows[:count]
                rows = rows[count:]

    def _own(self, cache: caches.Cache) -> tuple[Layers, Layers]:
        """A row's keys and values, of one token at least, and no longer than a place."""
        if not (length := cache[0].offset):
            keys, values = ([grow(array, 1, 1) for array in arrays] for arrays in self._nothing)
            return keys, values
        end = int(self._keys[0].shape[2]) if self._is_compiled else length
        return [layer.keys[:, :, :end] for layer in cache], [layer.values[:, :, :end] for layer in cache]

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows."""
        self._lengths = [self._lengths[index] for index in order]
        self._move([(place, row) for place, row in enumerate(order) if place != row])
        places = self._slots_for(len(order))
        if places < self._keys[0].shape[0]:
            self._keys = [mx.contiguous(keys[:places]) for keys in self._keys]
            self._values = [mx.contiguous(values[:places]) for values in self._values]
        self._set_offsets()

    def _move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Put rows into other places: (to, from) pairs."""
        if not moves:
            return
        taken = mx.array([row for _, row in moves], dtype=mx.uint32)
        keys, values = [array[taken] for array in self._keys], [array[taken] for array in self._values]
        mx.eval(keys, values)  # or else what is written to would also be read from, and be copied whole
        for moved, (place, _) in enumerate(moves):
            for array, rows in zip((*self._keys, *self._values), (*keys, *values), strict=True):
                array[place] = rows[moved]

    def extract(self, index: int) -> caches.Cache:
        """A copy of a row's keys and values."""
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
        """PrefillStrategy one token a row."""
        rows = len(self._lengths)
        self._ensure_capacity(max(self._lengths) + 1)
        if self._is_padded:
            inputs = mx.pad(inputs, (0, self._offsets.shape[0] - rows))
        logits, self._offsets, self._keys, self._values = self._step(inputs, self._offsets, self._keys, self._values)
        self._lengths = [length + 1 for length in self._lengths]
        return logits[:rows]

    def tokens_for(self, rows: int, longest: int) -> int:
        """Tokens that the places for such rows hold."""
        return max(self._slots_for(rows), int(self._keys[0].shape[0])) * self._capacity_for(longest)

    def compact(self) -> None:
        """Give back what is longer or more than the present rows need."""
        rows, present = max(1, len(self._lengths)), (int(self._keys[0].shape[0]), int(self._keys[0].shape[2]))
        places = min(1 << (rows - 1).bit_length(), present[0])
        span = min(slot_capacity(max(self._lengths, default=0) + 1, _SPAN_STEP), present[1])
        if (places, span) == present:
            return
        for arrays in (self._keys, self._values):
            for n in range(len(arrays)):  # one by one, so that only one is there twice
                arrays[n] = mx.contiguous(arrays[n][:places, :, :span])
                mx.eval(arrays[n])
        self._set_offsets()

    def _forward(
        self, inputs: mx.array, offsets: mx.array, keys: list[mx.array], values: list[mx.array]
    ) -> tuple[mx.array, mx.array, list[mx.array], list[mx.array]]:
        # A CPU's time grows with every row fed and token looked at; a GPU is better off with shapes that stay.
        visible = keys[0].shape[2] if self._is_padded else max(self._lengths) + 1
        step = StepPositions(offsets, inputs.shape[0], visible)
        cache = [SlotLayer(k, v, step) for k, v in zip(keys, values, strict=True)]
        logits = self._model(inputs[:, None], cache=cache)[:, -1, :]
        return logits, offsets + 1, [place.keys for place in cache], [place.values for place in cache]

    def _ensure_capacity(self, length: int) -> None:
        """Make places at least `length` tokens long."""
        self._grow(0, self._capacity_for(length))

    def _grow(self, places: int, span: int) -> None:
        self._keys = [grow(keys, places, span) for keys in self._keys]
        self._values = [grow(values, places, span) for values in self._values]

    def _capacity_for(self, length: int) -> int:
        """Length of places to have for a row of so many tokens, without shrinking."""
        return max(int(self._keys[0].shape[2]), slot_capacity(length, _SPAN_STEP))

    def _slots_for(self, rows: int) -> int:
        """Places to have: the next power of two, without shrinking for a few."""
        needed, present = 1 << (rows - 1).bit_length(), int(self._keys[0].shape[0])
        return present if needed <= present < 4 * needed else needed

    def _set_offsets(self) -> None:
        unused = self._keys[0].shape[0] - len(self._lengths)
        self._offsets = mx.array(self._lengths + [0] * unused, dtype=mx.int32)


def _put(
    at: mx.array, keys: Layers, values: Layers, row_keys: Sequence[Layers], row_values: Sequence[Layers]
) -> tuple[Layers, Layers]:
    """Keys and values with those of rows, [1, heads, tokens, dim] a layer, at the places from [1] on."""
    return (
        [_placed(array, mx.concatenate(rows), at) for array, *rows in zip(keys, *row_keys, strict=True)],
        [_placed(array, mx.concatenate(rows), at) for array, *rows in zip(values, *row_values, strict=True)],
    )


def _placed(array: mx.array, rows: mx.array, at: mx.array) -> mx.array:
    """The array with rows at their places, and zeros behind them.

    What is there gets a weight of 0, and 0 times what an overflow left would be no number.
    """
    if rows.shape[2] < array.shape[2]:
        nothing = mx.broadcast_to(mx.zeros((), dtype=array.dtype), (rows.shape[0], *array.shape[1:]))
        array = mx.slice_update(array, nothing, at, [0])
    return mx.slice_update(array, rows, at, [0])


class MergedCache:
    """BatchCache of any cache that mlx-lm can batch."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.clear()

    def clear(self) -> None:
        """Drop all rows."""
        self._cache: caches.Cache = []

    def join(self, rows: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add rows behind the present ones."""
        joining = caches.merge(rows)
        if not self._cache:
            self._cache = joining
            return
        for layer, other in zip(self._cache, joining, strict=True):
            layer.extend(other)

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows."""
        for layer in self._cache:
            layer.filter(list(order))

    def extract(self, index: int) -> caches.Cache:
        """A copy of a row's cache."""
        return caches.extract(self._cache, index)

    def advance(self, inputs: mx.array) -> mx.array:
        """PrefillStrategy one token a row."""
        logits: mx.array = self._model(inputs[:, None], cache=self._cache)[:, -1, :]
        return logits

    def tokens_for(self, rows: int, longest: int) -> int:
        """Tokens that a batch of such rows holds."""
        return rows * longest

    def compact(self) -> None:
        """mlx-lm's caches keep no more than their longest row needs."""
