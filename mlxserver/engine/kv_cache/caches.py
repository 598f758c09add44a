"""KV caches of sequences, one by one and batched.

A sequence's cache is a list with one mlx-lm cache per layer. mlx-lm's caches merge into a batched one and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxserver.engine.mlx import mx

from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    make_prompt_cache,
)

from mlxserver.engine.kv_cache.quantized import KVFormat, in_format
from mlxserver.engine.platform import cpu_attention
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.policy import current

Cache = list[Any]


def new_cache(model: Any) -> Cache:
    """An empty cache of one sequence, in the model's format (set_kv_format())."""
    cache: Cache = make_prompt_cache(model)
    kv = kv_format(model)
    return [in_format(layer, kv) for layer in cache] if kv else cache


def kv_format(model: Any) -> KVFormat | None:
    """The format of a model's quantised keys and values; None if they are kept as they are computed."""
    kv: KVFormat | None = getattr(model, "kv_format", None)
    return kv


def set_kv_format(model: Any, kv: KVFormat | None) -> None:
    """Have a model keep its keys and values quantised, or with None as they are computed."""
    model.kv_format = kv


def is_plain(model: Any) -> bool:
    """Whether every layer keeps all keys and values, quantised or not, which slots can hold (kv_cache/slots.py)."""
    return all(type(layer) is KVCache or keeps_quantized(layer) for layer in new_cache(model))


def keeps_quantized(layer: Any) -> bool:
    """Whether a layer's keys and values are quantised."""
    return isinstance(layer, QuantizedKVCache)


def keeps_state(model: Any) -> bool:
    """Whether a layer keeps a state (recurrence, convolution), which every token changes, padding included."""
    return any(isinstance(layer, ArraysCache) for layer in flat(new_cache(model)))


def has_attention(model: Any) -> bool:
    """Whether a layer keeps keys and values, not all of them states."""
    return not all(isinstance(layer, ArraysCache) for layer in flat(new_cache(model)))


def attends_in_blocks(model: Any) -> bool:
    """Whether no score of a chunk's attention is ever in memory, in any layer. Nothing is computed.

    That is so where the native kernels have all of it: not with 16 bits, sinks or soft caps, nor where the model adds
    scores of its own, as a latent attention does.
    """
    if not (current().replace_kernels and native()):
        return False
    cache, tokens = new_cache(model), mx.zeros((1, cpu_attention.MOST_WITHOUT_BLOCKS + 1), dtype=mx.uint32)
    with cpu_attention.watching() as calls:
        try:
            model(tokens, cache=cache)
        except Exception:  # of any kind: it is foreign code
            return False
    layers = sum(not isinstance(layer, ArraysCache) for layer in flat(cache))
    return len(calls) >= layers > 0 and all(calls)


def length(cache: Cache) -> int:
    """Tokens that a sequence's cache has seen; 0 where all its layers keep states, which do not count them."""
    return max(int(getattr(layer, "offset", 0)) for layer in flat(cache))


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights as they are held."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def pass_tokens(model: Any) -> int:
    """Tokens of KV cache of as many bytes as the weights; 0 where a token's bytes are unknown."""
    return weight_bytes(model) // own if (own := bytes_per_token(model)) else 0


def flat(cache: Sequence[Any]) -> Iterator[Any]:
    """The caches of all layers; those of a layer that has several, one by one."""
    for layer in cache:
        yield from flat(layer.caches) if hasattr(layer, "caches") else (layer,)


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Size in bytes of a model's KV cache.

    per_token: of the layers that keep all tokens. per_window_token: of those that keep `window` tokens of a sequence at
    most. per_sequence: of the states, whatever a sequence's length.
    """

    per_token: int
    per_window_token: int = 0
    window: int = 0
    per_sequence: int = 0

    @property
    def checkpoint(self) -> int:
        """Bytes of what a sequence has in all layers but those that keep all tokens, at most."""
        return self.per_sequence + self.per_window_token * self.window

    def total(self, tokens: int, sequences: int) -> int:
        """Bytes of the cache of so many sequences, which have so many tokens together."""
        windows = min(tokens, sequences * self.window) * self.per_window_token
        return tokens * self.per_token + windows + sequences * self.per_sequence

    def with_draft(self, draft: Any) -> CacheSizes:
        """The sizes with those of a draft model, which keeps all tokens, too."""
        return replace(self, per_token=self.per_token + cache_sizes(draft).per_token)


def cache_sizes(model: Any) -> CacheSizes:
    """The sizes of a model's KV cache. Nothing is computed."""
    cache = new_cache(model)
    model(mx.zeros((1, 1), dtype=mx.uint32), cache=cache)
    per_token = per_window_token = window = per_sequence = 0
    for layer in flat(cache):
        if not (length := _length(layer)):
            per_sequence += layer.nbytes
        elif size := int(getattr(layer, "max_size", 0) or 0):
            window, per_window_token = max(window, size), per_window_token + layer.nbytes // length
        else:
            per_token += layer.nbytes // length
    return CacheSizes(per_token, per_window_token, window, per_sequence)


def bytes_per_token(model: Any) -> int:
    """Bytes of KV cache per token, in all layers that keep keys and values. Nothing is computed."""
    sizes = cache_sizes(model)
    return sizes.per_token + sizes.per_window_token


def dequantized_bytes(model: Any) -> int:
    """Bytes per token that a prompt's attention dequantises in one layer, at most; 0 where nothing is quantised."""
    if not kv_format(model):
        return 0
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 1), dtype=mx.uint32), cache=cache)
    return max(int(layer.nbytes) // _length(layer) for layer in flat(cache) if isinstance(layer, KVCache))


def _length(layer: Any) -> int:
    """Tokens that the arrays of a layer have room for; 0 for a state."""
    keys = [array for _, array in tree_flatten(getattr(layer, "keys", None)) if isinstance(array, mx.array)]
    return int(keys[0].shape[2]) if keys and keys[0].ndim == 4 else 0


def merge(caches: Sequence[Cache]) -> Cache:
    """One batched cache of several sequences' own.

    Raises:
        NotImplementedError: a kind of cache that mlx-lm can't batch.
    """
    layers = zip(*caches, strict=True)
    try:
        return [layer[0].merge(list(layer)) for layer in layers]
    except AttributeError as error:
        raise NotImplementedError(f"this model's cache can't be batched: {error}") from error


def extract(batched: Cache, index: int, length: int | None = None) -> Cache:
    """One sequence's own cache out of a batched one. With its length in tokens known, this waits for nothing."""
    return [_extract_layer(layer, index, length) for layer in batched]


def _extract_layer(layer: Any, index: int, length: int | None) -> Any:
    if type(layer) is not BatchKVCache or length is None:
        return layer.extract(index)
    own = KVCache()
    own.offset = length
    if length:
        end = layer.size()
        own.keys = layer.keys[index : index + 1, :, end - length : end]
        own.values = layer.values[index : index + 1, :, end - length : end]
    return own


def is_finite(cache: Sequence[Any]) -> mx.array:
    """Whether a cache is without NaN and inf: an array of one bool, not evaluated.

    NaN or inf in one layer reaches all later ones, so that the last layer answers for all of them.
    """
    last = [layer for layer in flat(cache[-1:]) if layer is not None]
    arrays = [leaf for layer in last for _, leaf in tree_flatten(layer.state) if isinstance(leaf, mx.array)]
    are_finite = [mx.isfinite(array).all() for array in arrays if mx.issubdtype(array.dtype, mx.floating)]
    return mx.all(mx.stack([mx.array(True), *are_finite]))


def cache_bytes(cache: Sequence[Any]) -> int:
    """Bytes of a cache."""
    return sum(layer.nbytes for layer in flat(cache) if layer is not None)
