"""Places: keys and values of fixed length, for rows at different offsets.

Rule 1: what a row has not written lies behind what it may look at, with a weight of 0.
Rule 2: lengths are few, so that shapes recur: on a GPU every new shape costs, on CUDA some 60 ms, most of them for
        cuDNN's plan of the attention.
"""

from __future__ import annotations

from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches

Layers = list[mx.array]  # one array a layer


class StepPositions:
    """Where a step reads and writes, the same in every layer.

    offsets: [places], tokens that each one holds. rows: how many are fed, the first ones. visible: tokens to look at.
    """

    def __init__(self, offsets: mx.array, rows: int, visible: int) -> None:
        self.fed = offsets[:rows]
        self.rows, self.visible = rows, visible
        self._offsets = offsets[:, None, None, None]
        self._written: dict[int, mx.array] = {}

    def written(self, tokens: int) -> mx.array:
        """Where so many tokens of each place go, [places, 1, tokens, 1]."""
        if tokens not in self._written:
            self._written[tokens] = self._offsets + mx.arange(tokens)[:, None] if tokens > 1 else self._offsets
        return self._written[tokens]


class SlotLayer:
    """One layer's cache during a forward pass, in the shape that mlx-lm's models use.

    keys, values: [places, heads, span, dim].
    """

    def __init__(self, keys: mx.array, values: mx.array, step: StepPositions) -> None:
        self.keys, self.values = keys, values
        self.offset = step.fed
        self._step = step

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write tokens, [rows, heads, tokens, dim], each row's at its own offset."""
        rows, visible = self._step.rows, self._step.visible
        unused = [(0, self.keys.shape[0] - rows), (0, 0), (0, 0), (0, 0)]
        if unused[0][1]:
            keys, values = mx.pad(keys, unused), mx.pad(values, unused)
        at = self._step.written(keys.shape[2])
        self.keys = mx.put_along_axis(self.keys, mx.broadcast_to(at, keys.shape), keys, axis=2)
        self.values = mx.put_along_axis(self.values, mx.broadcast_to(at, values.shape), values, axis=2)
        return self.keys[:rows, :, :visible], self.values[:rows, :, :visible]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """What each row's tokens may look at: those before them and themselves, [rows, 1, N, visible]."""
        position, own = mx.arange(self._step.visible), self.offset[:, None, None] + mx.arange(N)[:, None]
        mask = position <= own
        if window_size is not None:
            mask = mask & (position > own - window_size)
        return mask[:, None]


def empty_layers(model: Any) -> tuple[Layers, Layers]:
    """Keys and values without a place, [0, heads, 0, dim] a layer; a step that is never computed tells the shapes."""
    sample = caches.new_cache(model)
    model(mx.zeros((1, 1), dtype=mx.uint32), cache=sample)

    def empty(array: mx.array) -> mx.array:
        _, heads, _, dim = array.shape
        return mx.zeros((0, heads, 0, dim), array.dtype)

    return [empty(layer.keys) for layer in sample], [empty(layer.values) for layer in sample]


def grow(array: mx.array, places: int, span: int) -> mx.array:
    """The array with room for so many places of so many tokens; one that has the room is left as it is."""
    missing = (max(0, places - array.shape[0]), max(0, span - array.shape[2]))
    return mx.pad(array, [(0, missing[0]), (0, 0), (0, missing[1]), (0, 0)]) if any(missing) else array


def slot_capacity(tokens: int, least: int) -> int:
    """Length of a place for so many tokens: one of a few, a multiple of `least`, at most a quarter longer beyond it."""
    step = max(least, (1 << tokens.bit_length()) // 8)
    return -(-tokens // step) * step
