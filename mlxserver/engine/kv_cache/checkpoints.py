"""Checkpoints of a KV cache: what its layers held at one length, where they can't be trimmed back to it.

A layer that keeps all tokens can be trimmed to any length. A sliding window that is full can't, nor can a state
(recurrence, convolution). A sequence's cache is therefore stored in two parts: the layers that can be trimmed, once,
and a checkpoint of the others per length that is to be gone on from.

Rule 1: the arrays of a part are not those of a cache in use: models write to a cache's arrays in place.
Rule 2: a part has the structure of the whole cache, with None in the place of the layers that it does not have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from mlxserver.engine.mlx import mx

from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlxserver.engine.kv_cache.caches import Cache, flat, is_finite, new_cache

_KEEP_ALL = (KVCache, QuantizedKVCache, ConcatenateKVCache)
_MOST = 8  # checkpoints of one sequence
_LATEST = 3  # of them: behind the history, the prompt and the answer


def needs_checkpoints(model: Any) -> bool:
    """Whether a layer does not keep all tokens, so that its cache can't be trimmed to any length."""
    return not all(isinstance(layer, _KEEP_ALL) for layer in flat(new_cache(model)))


def trimmable_part(cache: Cache) -> Cache:
    """The layers that can be trimmed to any length, as they are; a window that is not full is one of them."""
    return _part(cache, _is_trimmable, lambda layer: layer)


def checkpoint_part(cache: Cache) -> Cache:
    """A copy of the layers that do not keep all tokens."""
    return _part(cache, lambda layer: not isinstance(layer, _KEEP_ALL), _copied)


def lasting_part(cache: Cache) -> Cache:
    """The layers that keep all tokens, as they are: those that no checkpoint has."""
    return _part(cache, lambda layer: isinstance(layer, _KEEP_ALL), lambda layer: layer)


def cut_out(part: Cache, start: int, end: int) -> Cache:
    """The tokens from `start` up to `end` of layers that keep all tokens."""

    def cut(layer: Any) -> Any:
        if layer.keys is None:
            return layer
        own = copy.copy(layer)
        own.keys, own.values = tree_map(lambda array: array[:, :, start:end], (layer.keys, layer.values))
        own.offset = end - start
        return own

    return _part(part, lambda layer: layer is not None, cut)


def arrays_of(part: Cache) -> list[mx.array]:
    """All arrays of a part."""
    layers = [layer for layer in flat(part) if layer is not None]
    return [leaf for layer in layers for _, leaf in tree_flatten(layer.state) if isinstance(leaf, mx.array)]


def is_sound(part: Cache) -> bool:
    """Whether a part is without NaN and inf. Waits for the device."""
    return bool(is_finite([layer for layer in flat(part) if layer is not None]))


def is_whole(part: Cache) -> bool:
    """Whether a part has all layers."""
    return all(layer is not None for layer in flat(part))


def is_empty(part: Cache) -> bool:
    """Whether a part has no layer."""
    return all(layer is None for layer in flat(part))


def joined(trimmable: Cache | None, surplus: int, checkpoint: Cache | None) -> Cache:
    """A copy of a whole cache, which shares the arrays: a checkpoint, and all other layers without their last `surplus`
    tokens.
    """

    def join(own: Any, state: Any) -> Any:
        present = own if own is not None else state
        if hasattr(present, "caches"):
            owns = own.caches if own is not None else [None] * len(state.caches)
            states = state.caches if state is not None else [None] * len(own.caches)
            return CacheList(*map(join, owns, states))
        layer = copy.deepcopy(own if state is None else state)
        if state is None and surplus:
            layer.trim(surplus)
        return layer

    parts = trimmable or checkpoint or []
    return list(map(join, trimmable or [None] * len(parts), checkpoint or [None] * len(parts)))


def stops(boundaries: Sequence[int], length: int, done: int, interval: int) -> list[int]:
    """The lengths, in order, at which checkpoints of a prompt of `length` tokens are taken.

    They are the boundaries of its messages, every multiple of `interval` tokens, and its end, one token before which
    the prompt is prefilled. done: tokens that are in its cache already.
    """
    inner = {*boundaries, *range(interval, length, interval), length - 1}
    return sorted(stop for stop in inner if done < stop < length)


def superfluous(lengths: Sequence[int]) -> list[int]:
    """The lengths, ascending, of a sequence's checkpoints that are too many.

    The first stays, behind the system message, and so do the latest. Of the others those go that have the nearest ones
    beside them.
    """
    kept, gone = list(lengths), []
    while len(kept) > _MOST:
        inner = range(1, len(kept) - _LATEST)
        nearest = min(inner, key=lambda index: kept[index + 1] - kept[index - 1])
        gone.append(kept.pop(nearest))
    return gone


def _part(cache: Sequence[Any], is_kept: Callable[[Any], bool], kept: Callable[[Any], Any]) -> Cache:
    def part(layer: Any) -> Any:
        if hasattr(layer, "caches"):
            return CacheList(*map(part, layer.caches))
        return kept(layer) if is_kept(layer) else None

    return list(map(part, cache))


def _is_trimmable(layer: Any) -> bool:
    if isinstance(layer, ChunkedKVCache):
        return not layer.start_position
    return bool(layer.is_trimmable())


def _copied(layer: Any) -> Any:
    """A copy of a layer that holds no memory of its own beyond what it needs."""
    own = copy.copy(layer)
    if isinstance(layer, RotatingKVCache) and layer.keys is not None:
        own.keys, own.values = (_window(layer, array) for array in (layer.keys, layer.values))
        own._idx = own.keys.shape[2]
    elif isinstance(layer, ArraysCache):
        own.cache = [array if array is None else mx.contiguous(array) for array in layer.cache]
    else:
        own = copy.deepcopy(layer)
        own.__dict__ = tree_map(lambda leaf: mx.contiguous(leaf) if isinstance(leaf, mx.array) else leaf, vars(own))
    return own


def _window(layer: RotatingKVCache, array: mx.array) -> mx.array:
    """Keys or values of a window, in the order of their tokens, and none before it."""
    ordered = layer._temporal_order(array)
    surplus = ordered.shape[2] - layer.max_size
    if surplus > 0:
        ordered = layer._trim(surplus, ordered)
    return mx.contiguous(ordered)
