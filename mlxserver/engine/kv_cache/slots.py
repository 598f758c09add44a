"""Slots: KV caches of fixed capacity, for sequences at different offsets.

Rule 1: values that a sequence has not written lie behind those that it may attend to, with a weight of 0.
Rule 2: capacities are few, so that shapes recur: on a GPU every new shape costs, on CUDA some 60 ms, most of them for
        cuDNN's plan of the attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from mlxserver.engine.mlx import mx

from mlx.utils import tree_map

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.quantized import Stored, arrays_of, as_stored, by_layer

Layers = list[mx.array]  # of keys or of values: one array per layer, or three where they are quantised


class StepPositions:
    """Positions that a step reads and writes, the same in every layer.

    offsets: [slots], tokens in each. batch: number of slots that are computed, the first ones. visible: tokens to
    attend to.
    """

    def __init__(self, offsets: mx.array, batch: int, visible: int) -> None:
        self.computed = offsets[:batch]
        self.batch, self.visible = batch, visible
        self._offsets = offsets[:, None, None, None]
        self._written: dict[tuple[int, ...], mx.array] = {}

    def written(self, shape: tuple[int, ...]) -> mx.array:
        """Positions that values are written to, of their shape, [slots, heads, tokens, dim]."""
        if shape not in self._written:
            tokens = shape[2]
            at = self._offsets + mx.arange(tokens)[:, None] if tokens > 1 else self._offsets
            self._written[shape] = mx.broadcast_to(at, shape)
        return self._written[shape]


class SlotLayer:
    """Cache of one layer during a forward pass, with the interface that mlx-lm's models use.

    keys, values: [slots, heads, capacity, dim], or quantised ones. is_causal: each token attends to all before it and
    itself, unless it has a window.
    """

    is_causal = True

    def __init__(self, keys: Stored, values: Stored, step: StepPositions) -> None:
        self.keys, self.values = keys, values
        self.offset = step.computed
        self._step = step

    @property
    def classes(self) -> tuple[SlotLayer]:
        """The capacity classes: this one."""
        return (self,)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Stored, Stored]:
        """Write tokens, [batch, heads, tokens, dim], those of each sequence at its own offset."""
        self.keys = tree_map(self._written, self.keys, as_stored(keys, self.keys))
        self.values = tree_map(self._written, self.values, as_stored(values, self.values))
        return tree_map(self._visible, self.keys), tree_map(self._visible, self.values)

    def _written(self, array: mx.array, tokens: mx.array) -> mx.array:
        if unused := array.shape[0] - self._step.batch:
            tokens = mx.pad(tokens, [(0, unused), (0, 0), (0, 0), (0, 0)])
        return mx.put_along_axis(array, self._step.written(tokens.shape), tokens, axis=2)

    def _visible(self, array: mx.array) -> mx.array:
        return array[: self._step.batch, :, : self._step.visible]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Mask of each token's attention, to those before it and itself: [batch, 1, N, visible] of bool."""
        position, own = mx.arange(self._step.visible), self.offset[:, None, None] + mx.arange(N)[:, None]
        mask = position <= own
        if window_size is not None:
            mask = mask & (position > own - window_size)
        return mask[:, None]


def empty_layers(model: Any) -> tuple[Layers, Layers]:
    """Keys and values without a slot, [0, heads, 0, dim] each; a step that is never computed has the shapes."""
    sample = caches.new_cache(model)
    model(mx.zeros((1, 1), dtype=mx.uint32), cache=sample)

    def empty(array: mx.array) -> mx.array:
        _, heads, _, dim = array.shape
        return mx.zeros((0, heads, 0, dim), array.dtype)

    keys, values = flat_arrays(sample)
    return list(map(empty, keys)), list(map(empty, values))


def flat_arrays(layers: Iterable[Any]) -> tuple[Layers, Layers]:
    """Keys and values of the caches of all layers."""
    stored = [(arrays_of(layer.keys), arrays_of(layer.values)) for layer in layers]
    return [*chain(*(keys for keys, _ in stored))], [*chain(*(values for _, values in stored))]


def slot_layers(keys: Layers, values: Layers, step: StepPositions) -> list[SlotLayer]:
    """The caches of all layers during a forward pass."""
    return [SlotLayer(k, v, step) for k, v in zip(by_layer(keys), by_layer(values), strict=True)]


def fill(cache: caches.Cache, keys: Layers, values: Layers, offset: int) -> None:
    """Give a sequence's cache the keys and values of so many tokens."""
    for layer, k, v in zip(cache, by_layer(keys), by_layer(values), strict=True):
        layer.keys, layer.values, layer.offset = k, v, offset


def grow(array: mx.array, slots: int, capacity: int) -> mx.array:
    """The array with at least so many slots and so much capacity; the same one if it has them already."""
    missing = (max(0, slots - array.shape[0]), max(0, capacity - array.shape[2]))
    return mx.pad(array, [(0, missing[0]), (0, 0), (0, missing[1]), (0, 0)]) if any(missing) else array


def slot_capacity(tokens: int, least: int) -> int:
    """Capacity of a slot for so many tokens: a multiple of `least`, one of few; at most a quarter longer beyond it."""
    step = max(least, (1 << tokens.bit_length()) // 8)
    return -(-tokens // step) * step
