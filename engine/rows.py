"""The keys and values of the rows that decode together, and the step that advances them.

Rule 1: rows stand in the order in which the batcher has them; row i of the logits is row i of the batch.
Rule 2: every row has a fixed place, long enough for all, so that a step writes one token a row and copies nothing,
        and shapes change seldom. That is what makes a compiled step possible.
Rule 3: models with other caches (sliding windows, recurrent states) use mlx-lm's own batched caches instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from engine import device, kv

_SPAN_STEP = 256  # tokens by which places grow at first, and a quarter of their length later


class Rows(Protocol):
    """What the batcher needs of the decoding rows."""

    def join(self, caches: Sequence[kv.Cache]) -> None:
        """Add rows, each with its own cache, behind the present ones."""

    def keep(self, order: Sequence[int]) -> None:
        """Keep only the rows at these indices, in this order; at least one."""

    def extract(self, index: int) -> kv.Cache:
        """A row's own cache: a copy of its keys and values."""

    def advance(self, inputs: mx.array) -> mx.array:
        """Feed one token a row, [rows] -> logits [rows, vocab]. Nothing is evaluated."""


def make_rows(model: Any) -> Rows:
    """The rows of a model, empty."""
    if all(type(layer) is KVCache for layer in kv.new_cache(model)):
        return PlacedRows(model)
    return MergedRows(model)


class _Place:
    """One layer's cache during a step, in the shape that mlx-lm's models use. `visible`: tokens to look at, or all."""

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array, visible: int | None) -> None:
        self.keys, self.values, self.offset = keys, values, offset
        self._visible = keys.shape[2] if visible is None else visible

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write one token a row, [rows, heads, 1, dim], each at its row's own offset."""
        at = self.offset[:, None, None, None]
        self.keys = mx.put_along_axis(self.keys, mx.broadcast_to(at, keys.shape), keys, axis=2)
        self.values = mx.put_along_axis(self.values, mx.broadcast_to(at, values.shape), values, axis=2)
        return self.keys[:, :, : self._visible], self.values[:, :, : self._visible]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """What each row may look at: its own tokens, the one being fed included."""
        position, offset = mx.arange(self._visible)[None], self.offset[:, None]
        mask = position <= offset
        if window_size is not None:
            mask = mask & (position > offset - window_size)
        return mask[:, None, None, :]


class PlacedRows:
    """Rows of plain keys and values, [places, heads, span, dim] a layer. Places behind the last row are unused."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._is_padded = not device.is_cpu()  # a CPU's time grows with every row, a GPU's with every new shape
        # Compiled, a step costs no Python; on a CPU each new shape would cost seconds of the C++ compiler.
        self._step = mx.compile(self._forward) if device.describe().kind == "cuda" else self._forward
        self._keys, self._values = self._no_places()
        self._lengths: list[int] = []
        self._offsets = mx.zeros((0,), dtype=mx.int32)

    def join(self, caches: Sequence[kv.Cache]) -> None:
        """Add rows behind the present ones."""
        first = len(self._lengths)
        self._lengths += [cache[0].offset for cache in caches]
        self._fit()
        for n, layers in enumerate(zip(*caches, strict=True)):
            for place, layer in enumerate(layers, first):
                length = layer.offset
                if length:
                    self._keys[n][place : place + 1, :, :length] = layer.keys[..., :length, :]
                    self._values[n][place : place + 1, :, :length] = layer.values[..., :length, :]
        self._set_offsets()

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows."""
        self._lengths = [self._lengths[index] for index in order]
        places = self._places_for(len(order))
        indices = mx.array([*order, *([0] * (places - len(order)))], dtype=mx.uint32)
        self._keys = [keys[indices] for keys in self._keys]
        self._values = [values[indices] for values in self._values]
        self._set_offsets()

    def extract(self, index: int) -> kv.Cache:
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
        """Feed one token a row."""
        rows = len(self._lengths)
        self._stretch(max(self._lengths) + 1)
        padded = mx.pad(inputs, (0, self._offsets.shape[0] - rows)) if self._is_padded else inputs
        logits, self._offsets, self._keys, self._values = self._step(padded, self._offsets, self._keys, self._values)
        self._lengths = [length + 1 for length in self._lengths]
        return logits[:rows]

    def _forward(
        self, inputs: mx.array, offsets: mx.array, keys: list[mx.array], values: list[mx.array]
    ) -> tuple[mx.array, mx.array, list[mx.array], list[mx.array]]:
        # A CPU's time grows with every token that is looked at; a GPU is better off with a shape that stays.
        visible = None if self._is_padded else max(self._lengths) + 1
        cache = [_Place(k, v, offsets, visible) for k, v in zip(keys, values, strict=True)]
        logits = self._model(inputs[:, None], cache=cache)[:, -1, :]
        return logits, offsets + 1, [place.keys for place in cache], [place.values for place in cache]

    def _no_places(self) -> tuple[list[mx.array], list[mx.array]]:
        """Arrays without a place, in the model's shapes, which a step that is never computed tells."""
        sample = kv.new_cache(self._model)
        self._model(mx.zeros((1, 1), dtype=mx.uint32), cache=sample)

        def empty(array: mx.array) -> mx.array:
            _, heads, _, dim = array.shape
            return mx.zeros((0, heads, 0, dim), array.dtype)

        return [empty(layer.keys) for layer in sample], [empty(layer.values) for layer in sample]

    def _fit(self) -> None:
        """Make places for all rows."""
        self._stretch(max(self._lengths) + 1)
        missing = self._places_for(len(self._lengths)) - self._keys[0].shape[0]
        if missing > 0:
            self._keys = [mx.pad(keys, [(0, missing), (0, 0), (0, 0), (0, 0)]) for keys in self._keys]
            self._values = [mx.pad(values, [(0, missing), (0, 0), (0, 0), (0, 0)]) for values in self._values]

    def _stretch(self, length: int) -> None:
        """Make places at least `length` tokens long."""
        span = self._keys[0].shape[2]
        if length <= span:
            return
        step = max(_SPAN_STEP, (1 << length.bit_length()) // 8)
        missing = -(-length // step) * step - span
        self._keys = [mx.pad(keys, [(0, 0), (0, 0), (0, missing), (0, 0)]) for keys in self._keys]
        self._values = [mx.pad(values, [(0, 0), (0, 0), (0, missing), (0, 0)]) for values in self._values]

    def _places_for(self, rows: int) -> int:
        """Places to have: as many as rows, or the next power of two, without shrinking for a few."""
        if not self._is_padded:
            return rows
        needed, present = 1 << (rows - 1).bit_length(), int(self._keys[0].shape[0])
        return present if needed <= present < 4 * needed else needed

    def _set_offsets(self) -> None:
        unused = self._keys[0].shape[0] - len(self._lengths)
        self._offsets = mx.array(self._lengths + [0] * unused, dtype=mx.int32)


class MergedRows:
    """Rows of any cache that mlx-lm can batch."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: kv.Cache = []

    def join(self, caches: Sequence[kv.Cache]) -> None:
        """Add rows behind the present ones."""
        joining = kv.merge(caches)
        if not self._cache:
            self._cache = joining
            return
        for layer, other in zip(self._cache, joining, strict=True):
            layer.extend(other)

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows."""
        for layer in self._cache:
            layer.filter(list(order))

    def extract(self, index: int) -> kv.Cache:
        """A copy of a row's cache."""
        return kv.extract(self._cache, index)

    def advance(self, inputs: mx.array) -> mx.array:
        """Feed one token a row."""
        logits: mx.array = self._model(inputs[:, None], cache=self._cache)[:, -1, :]
        return logits
