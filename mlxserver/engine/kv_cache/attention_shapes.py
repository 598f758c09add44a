"""Attention of prompts in few shapes, where a device plans each one.

cuDNN takes some 60 ms to plan the attention of tokens and keys whose numbers it has not seen. Behind a prefix, keys
have another number in every chunk. Within padded(), queries and keys are padded to one of few lengths, and a mask hides
them. What a layer keeps is not padded: any model will do whose code calls scaled_dot_product_attention() (ragged.py).

Rule: a padded query attends to the first key, so that no row is without one; its result is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlxserver.engine.mlx import mx

_LEAST_QUERIES, _LEAST_KEYS = 32, 256
_WIDEST = 128  # values per head that cuDNN takes; MLX computes others in steps that need no plan

Mask = mx.array | str | None
Attend = Callable[..., mx.array]  # as mlx_lm.models.base.scaled_dot_product_attention


class _Masks:
    """Padded masks of one forward pass: layers share theirs."""

    def __init__(self) -> None:
        self._padded: dict[tuple[int, ...], tuple[Mask, mx.array]] = {}

    def padded(self, mask: Mask, queries: tuple[int, int], keys: tuple[int, int]) -> mx.array:
        """The mask [..., queries, keys], each with its number and the one that it is padded to."""
        key = (id(mask), *queries, *keys)
        if key not in self._padded:  # the mask is kept, so that its identity stays its own
            self._padded[key] = mask, _padded(_as_array(mask, queries[0], keys[0]), queries, keys)
        return self._padded[key][1]


class _Local(threading.local):
    masks: _Masks | None = None


_local = _Local()


@contextmanager
def padded(is_padded: bool = True) -> Iterator[None]:
    """Within the block, a forward pass of the calling thread, attention has one of few shapes."""
    _local.masks = _Masks() if is_padded else None
    try:
        yield
    finally:
        _local.masks = None


def few_lengths(length: int, least: int) -> int:
    """The next length of few: two per power of two, at least `least`."""
    power = max(least, 1 << (length - 1).bit_length())
    return power * 3 // 4 if least < power and length <= power * 3 // 4 else power


def attention(
    attend: Attend,
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """attend() of these, padded where padded() says so. queries: [batch, heads, tokens, dim]."""
    masks = _local.masks
    if masks is None or not _is_planned(queries, keys, values, cache):
        return attend(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    tokens, present = queries.shape[2], keys.shape[2]
    all_tokens, all_keys = few_lengths(tokens, _LEAST_QUERIES), few_lengths(present, _LEAST_KEYS)
    if (all_tokens, all_keys) != (tokens, present):
        mask = masks.padded(mask, (tokens, all_tokens), (present, all_keys))
    result = attend(
        _longer(queries, all_tokens),
        _longer(keys, all_keys),
        _longer(values, all_keys),
        cache=cache,
        scale=scale,
        mask=mask,
        sinks=sinks,
    )
    return result[:, :, :tokens]


def _is_planned(queries: mx.array, keys: Any, values: Any, cache: Any) -> bool:
    """Whether the attention of these is planned; that of one token is not."""
    is_quantized = hasattr(cache, "bits") or not isinstance(keys, mx.array)
    return not is_quantized and queries.shape[2] > 1 and max(queries.shape[3], values.shape[3]) <= _WIDEST


def _longer(array: mx.array, length: int) -> mx.array:
    """The array [batch, heads, tokens, dim] with so many tokens, and strides that follow from its shape."""
    missing = length - array.shape[2]
    return mx.pad(array, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else mx.contiguous(array)


def _as_array(mask: Mask, tokens: int, keys: int) -> mx.array:
    """A mask as an array [..., tokens, keys], of bool or of what is added to scores."""
    if isinstance(mask, mx.array):
        return mx.broadcast_to(mask, (*mask.shape[:-2], tokens, keys))
    if mask is None:
        return mx.ones((tokens, keys), dtype=mx.bool_)
    return mx.arange(keys) <= mx.arange(keys - tokens, keys)[:, None]


def _padded(mask: mx.array, queries: tuple[int, int], keys: tuple[int, int]) -> mx.array:
    is_bool = mask.dtype == mx.bool_
    shown, hidden = (True, False) if is_bool else (0.0, mx.finfo(mask.dtype).min)
    others = [(0, 0)] * (mask.ndim - 2)
    tall = mx.pad(mask, [*others, (0, queries[1] - queries[0]), (0, 0)], constant_values=mx.array(shown, mask.dtype))
    return mx.pad(tall, [*others, (0, 0), (0, keys[1] - keys[0])], constant_values=mx.array(hidden, mask.dtype))
