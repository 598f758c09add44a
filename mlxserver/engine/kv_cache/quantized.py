"""Quantised keys and values: affine, in groups of a vector's values (mlx.core.quantize), a third of 16 bits or half.

A layer's keys, or values, are then a tuple of three arrays: packed words, scales and biases, [.., heads, tokens, n]
each. Their format follows from their shapes and the dimension of the vectors that are written to them.

Rule 1: everything but attention moves these arrays as it does plain ones, along the axes of sequences and tokens.
Rule 2: a decode step reads them as they are, on a CPU in a native kernel where that is built (cpu_attention.py). Of a
        chunk each layer is dequantised first: MLX's quantised products take four to eight times as long there on a CPU,
        and would write the scores out on a GPU.
Rule 3: what MLX quantises or multiplies is contiguous: on CUDA it has no products of other arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from mlxserver.engine.mlx import mx

from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache, QuantizedKVCache

from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.native.formats import has_kernel

Quantized = tuple[mx.array, mx.array, mx.array]  # words, scales, biases
Stored = mx.array | Quantized

_PARTS = 3


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Format of quantised keys and values: bits per value, and values that share a scale and a bias."""

    bits: int
    group_size: int

    def bytes_per_value(self, value_bytes: int) -> float:
        """Bytes of a value with its part of the scale and the bias, which have `value_bytes` each."""
        return self.bits / 8 + 2 * value_bytes / self.group_size

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"


class QuantizedCache(QuantizedKVCache):  # type: ignore[misc]
    """Cache of one sequence in one layer: mlx-lm's own, which can also join a batch."""

    @property
    def state(self) -> Any:
        """All of it, as mlx-lm has it."""
        return self.keys, self.values, self.offset, self.group_size, self.bits

    @state.setter
    def state(self, state: Any) -> None:
        keys, values, self.offset, self.group_size, self.bits = state
        self.keys, self.values = keys and tuple(keys), values and tuple(values)  # lists, if they were in a file

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Quantized, Quantized]:
        """Write tokens, [1, heads, tokens, dim]: as mlx-lm's, but that has them quantised by MLX."""
        kv, tokens = KVFormat(self.bits, self.group_size), keys.shape[2]
        self.keys = self._written(self.keys, quantize(keys, kv))
        self.values = self._written(self.values, quantize(values, kv))
        self.offset += tokens
        fetched: tuple[Quantized, Quantized] = self.keys_and_values()
        return fetched

    def _written(self, stored: Quantized | None, tokens: Quantized) -> Quantized:
        """What is stored, and more tokens behind it."""
        parts = stored or (None, None, None)
        return cast(Quantized, tuple(self._written_part(part, own) for part, own in zip(parts, tokens, strict=True)))

    def _written_part(self, part: mx.array | None, tokens: mx.array) -> mx.array:
        start, end = self.offset, self.offset + tokens.shape[2]
        if part is None or part.shape[2] < end:
            heads, added, dim = tokens.shape[1], -(-(end - start) // self.step) * self.step, tokens.shape[3]
            room = mx.zeros((tokens.shape[0], heads, added, dim), tokens.dtype)
            part = room if part is None else mx.concatenate([part[:, :, :start], room], axis=2)
        part[:, :, start:end] = tokens
        return part

    def size(self) -> int:
        """Tokens."""
        return int(self.offset)

    @classmethod
    def merge(cls, caches: Sequence[QuantizedCache]) -> BatchQuantizedCache:
        """One batched cache of several sequences' own."""
        return BatchQuantizedCache.merge(caches)


class BatchQuantizedCache(CacheList):  # type: ignore[misc]
    """Cache of several sequences in one layer: three of mlx-lm's batched ones, of words, of scales and of biases."""

    def __init__(self, parts: Sequence[BatchKVCache], group_size: int, bits: int) -> None:
        super().__init__(*parts)
        self.group_size, self.bits = group_size, bits

    @property
    def offset(self) -> mx.array:
        """Tokens of each sequence."""
        offset: mx.array = self.caches[0].offset
        return offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Quantized, Quantized]:
        """Write tokens, [batch, heads, tokens, dim]."""
        kv = KVFormat(self.bits, self.group_size)
        own_keys, own_values = quantize(keys, kv), quantize(values, kv)
        fetched = [part.update_and_fetch(*own) for part, *own in zip(self.caches, own_keys, own_values, strict=True)]
        words, scales, biases = fetched
        return (words[0], scales[0], biases[0]), (words[1], scales[1], biases[1])

    def make_mask(self, *arguments: Any, **options: Any) -> Any:
        """As mlx-lm's batched caches."""
        return self.caches[0].make_mask(*arguments, **options)

    def extract(self, index: int) -> QuantizedCache:
        """One sequence's own cache."""
        own = [part.extract(index) for part in self.caches]
        cache = QuantizedCache(self.group_size, self.bits)
        cache.keys, cache.values = tuple(part.keys for part in own), tuple(part.values for part in own)
        cache.offset = own[0].offset
        return cache

    @classmethod
    def merge(cls, caches: Sequence[QuantizedCache]) -> BatchQuantizedCache:
        """One batched cache of several sequences' own."""
        parts = [BatchKVCache.merge([_part(cache, n) for cache in caches]) for n in range(_PARTS)]
        return cls(parts, caches[0].group_size, caches[0].bits)


def _part(cache: QuantizedCache, n: int) -> KVCache:
    """The words, the scales or the biases of a cache."""
    part = KVCache()
    if cache.keys is not None:
        part.keys, part.values, part.offset = cache.keys[n], cache.values[n], cache.offset
    return part


def in_format(layer: Any, kv: KVFormat) -> Any:
    """An empty cache of a layer with its plain keys and values quantised; what else it has stays."""
    if hasattr(layer, "caches"):
        return CacheList(*(in_format(own, kv) for own in layer.caches))
    return QuantizedCache(kv.group_size, kv.bits) if type(layer) is KVCache else layer


def arrays_of(stored: Stored) -> list[mx.array]:
    """The arrays of a layer's keys or values."""
    return list(stored) if isinstance(stored, tuple) else [stored]


def by_layer(arrays: Sequence[mx.array]) -> list[Stored]:
    """Keys or values of layers, from the arrays of all of them."""
    if arrays and arrays[0].dtype != mx.uint32:
        return list(arrays)
    starts = range(0, len(arrays), _PARTS)
    return [(arrays[start], arrays[start + 1], arrays[start + 2]) for start in starts]


def as_stored(array: mx.array, stored: Stored) -> Stored:
    """New keys or values, [batch, heads, tokens, dim], in the form of those that are stored."""
    if not isinstance(stored, tuple):
        return array
    return quantize(array, _format(stored, array.shape[-1]))


def quantize(array: mx.array, kv: KVFormat) -> Quantized:
    """Quantised keys or values, [batch, heads, tokens, dim]."""
    kernels = _kernels(array.dtype, kv)
    words, scales, biases = (kernels or mx).quantize(mx.contiguous(array), kv.group_size, kv.bits)
    return words, scales, biases


def dequantized(stored: Quantized, kv: KVFormat) -> mx.array:
    """Keys or values, [batch, heads, tokens, dim]."""
    array: mx.array = (_kernels(stored[1].dtype, kv) or mx).dequantize(*stored, kv.group_size, kv.bits)
    return array


def _kernels(dtype: mx.Dtype, kv: KVFormat) -> Any | None:
    """The native kernels, where they have the format of values of this type."""
    return native() if dtype == mx.float32 and has_kernel("affine", kv.bits, kv.group_size) else None


def can_decode(queries: mx.array) -> bool:
    """Whether decode_attention() can have these, as far as their shape says it: CUDA multiplies whole 64 values."""
    return queries.shape[2] == 1 and queries.shape[3] % 64 == 0


def format_of(queries: mx.array, keys: Quantized) -> KVFormat:
    """The format of keys, and of the values beside them."""
    return _format(keys, queries.shape[-1])


def decode_attention(queries: mx.array, keys: Quantized, values: Quantized, scale: float, mask: Any) -> mx.array:
    """Attention of one token per sequence: [batch, heads, 1, dim].

    queries: [batch, heads, 1, dim]. mask: of bool, or to be added, [batch, 1 or heads, 1, tokens]; None for none. All
    query heads of a key head are in one product, so that its keys are read once.
    """
    kv = format_of(queries, keys)
    batch, heads, _, dim = queries.shape
    groups = keys[0].shape[1]
    rows = (queries * scale).reshape(batch, groups, heads // groups, dim)
    scores = _product(rows, keys, kv, transpose=True)
    if isinstance(mask, mx.array):  # "causal" masks nothing of one token's
        if mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], groups, heads // groups, -1)
        is_bool = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min) if is_bool else scores + mask
    weights = mx.softmax(scores, axis=-1, precise=True)
    return _product(weights, values, kv, transpose=False).reshape(batch, heads, 1, -1)


def _product(rows: mx.array, stored: Quantized, kv: KVFormat, *, transpose: bool) -> mx.array:
    words, scales, biases = map(mx.contiguous, stored)
    return mx.quantized_matmul(
        mx.contiguous(rows), words, scales, biases, transpose=transpose, group_size=kv.group_size, bits=kv.bits
    )


def _format(stored: Quantized, dim: int) -> KVFormat:
    words, scales, _ = stored
    return KVFormat(32 * words.shape[-1] // dim, dim // scales.shape[-1])
