"""Attention for a Linux CPU: one operation where the native kernels are built, or else products and the exponentials of
cpu_kernels.py.

Rule: arrays that are not plain float32 are left to MLX's function.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import cpu_matmul
from mlxserver.engine.platform.attention_memory import SCORES_AT_ONCE
from mlxserver.engine.platform.cpu_kernels import FEW, exp_of_difference, once_per_step
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.native.formats import has_kernel as has_format

_FEW = 16  # tokens of a sequence whose attention is faster without blocks of keys
MOST_WITHOUT_BLOCKS = 64  # tokens of a sequence whose attention is faster so if keys are too wide for blocks
_MASKED = -1e30  # the score of a masked position


class _Thread(threading.local):
    is_stepwise = False
    calls: list[bool] | None = None  # watching()


_thread = _Thread()


@contextmanager
def layer_by_layer(is_stepwise: bool) -> Iterator[None]:
    """On this thread, compute each layer of a model before the next one is prepared, for example if other models are
    running, or lest the layers ahead hold memory.

    MLX lets all threads together have some ten tasks under way. A thread that submits a whole forward pass occupies
    them, and each operation of another model's step waits for one of them: beside chunks of 256 tokens a step took 325
    ms, and 54 beside the same chunks layer by layer; alone, a pass takes a tenth longer so. On a GPU nothing changes.
    """
    _thread.is_stepwise = is_stepwise
    try:
        yield
    finally:
        _thread.is_stepwise = False


@contextmanager
def watching() -> Iterator[list[bool]]:
    """On this thread, record of each call of attention() whether no score of its is ever in memory."""
    calls = _thread.calls = list[bool]()
    try:
        yield calls
    finally:
        _thread.calls = None


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
) -> mx.array:
    """As mx.fast.scaled_dot_product_attention: q [B, heads, L, dim], k and v [B, kv heads, T, dim]."""
    is_stepwise = _thread.is_stepwise and _are_computed(q, k, v)
    is_plain = q.dtype == mx.float32 and sinks is None and not options
    attended = _by_native_kernel(q, k, v, scale, mask) if is_plain else None
    if _thread.calls is not None:
        has_scores = isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] > 1
        _thread.calls.append(attended is not None and not has_scores)
    if not is_plain:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    if attended is not None:
        return attended
    batch, heads, length, _ = q.shape
    scores = batch * heads * length * k.shape[2]
    if is_stepwise and scores > SCORES_AT_ONCE and max(batch, k.shape[1], length) > 1:
        return _in_halves(q, k, v, scale, mask)
    return _by_products(q, k, v, scale, mask)


def has_kernel(keys: Any, values: Any, dim: int) -> bool:
    """Whether the native kernels read keys of so many dimensions, and values, in the form in which a cache has them:
    arrays of float32, or tuples of words, scales and biases.
    """
    if native() is None:
        return False
    if not isinstance(keys, tuple):
        return bool(keys.dtype == values.dtype == mx.float32)
    bits = 32 * keys[0].shape[-1] // dim
    return all(_is_known(stored, bits) for stored in (keys, values))


def _is_known(stored: tuple[mx.array, mx.array, mx.array], bits: int) -> bool:
    words, scales, _ = stored
    dim = 32 * words.shape[-1] // bits
    is_known = scales.dtype == mx.float32 and has_format("affine", bits, dim // scales.shape[-1])
    return is_known and dim <= native().MOST_QUANTIZED_DIM


def of_few_tokens(q: mx.array, keys: Any, values: Any, scale: float, mask: Any) -> mx.array | None:
    """Attention of a few tokens per sequence, [B, heads, L, dim], to keys and values that has_kernel() may know;
    None where it has no kernel.
    """
    length, total = q.shape[2], (keys[0] if isinstance(keys, tuple) else keys).shape[2]
    if q.dtype != mx.float32 or length >= _FEW or not has_kernel(keys, values, q.shape[3]):
        return None
    hidden = _hidden(mask, length, total)
    if hidden is not None and (hidden.dtype != mx.float32 or hidden.shape[-1] != total or hidden.shape[1] > 1):
        return None
    return _attended(q, keys, values, scale, hidden, isinstance(mask, str))


def _hidden(mask: Any, length: int, total: int) -> mx.array | None:
    """The addends of a mask that is an array, in four dimensions."""
    if not isinstance(mask, mx.array):
        return None
    hidden: mx.array = _additive_of_step(mask, length, total)
    return hidden.reshape(*[1] * (4 - hidden.ndim), *hidden.shape)


def _attended(q: mx.array, keys: Any, values: Any, scale: float, hidden: mx.array | None, is_causal: bool) -> mx.array:
    if hidden is not None:
        hidden = mx.broadcast_to(hidden, (hidden.shape[0], 1, q.shape[2], hidden.shape[3]))
    attended: mx.array = native().attend(q, keys, values, scale, hidden, is_causal)
    return attended


def _by_native_kernel(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array | None:
    """Attention in one operation; None where it has no kernel."""
    kernels = native()
    if kernels is None or not k.dtype == v.dtype == mx.float32:
        return None
    length, total = q.shape[2], k.shape[2]
    hidden = _hidden(mask, length, total)
    if hidden is not None and (hidden.dtype != mx.float32 or hidden.shape[-1] != total):
        return None
    if length >= _FEW and max(q.shape[3], v.shape[3]) <= kernels.MOST_DIM:
        attended: mx.array = kernels.attend_in_blocks(q, k, v, scale, hidden, isinstance(mask, str))
        return attended
    if length > MOST_WITHOUT_BLOCKS or (hidden is not None and hidden.shape[1] > 1):
        return None
    return _attended(q, k, v, scale, hidden, isinstance(mask, str))


def _by_products(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array:
    """Attention with all query heads of one key head in one product."""
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    rows = q.reshape(batch, groups, heads // groups * length, dim) * scale
    scores = cpu_matmul.times_keys(rows, k)
    if mask is not None:
        hidden = (_additive_of_step if length == 1 else _additive)(mask, length, k.shape[2])
        if length == 1 and (hidden.ndim < 4 or hidden.shape[1] == 1):
            scores = scores + hidden
        else:
            scores = (scores.reshape(batch, heads, length, -1) + hidden).reshape(scores.shape)
    if scores.size <= FEW:
        weighted = mx.softmax(scores, axis=-1) @ v
    else:
        weights = exp_of_difference(scores, mx.max(scores, axis=-1, keepdims=True))
        weighted = cpu_matmul.times_values(weights, v) / mx.sum(weights, axis=-1, keepdims=True)
    return weighted.reshape(batch, heads, length, v.shape[3])


def _are_computed(*arrays: mx.array) -> bool:
    """Compute the arrays. False: they are those of a function that is being compiled."""
    try:
        mx.eval(arrays)
    except ValueError:
        return False
    return True


def _in_halves(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array:
    """Attention of half the sequences, or of the key heads, or of the queries, and then of the others."""
    axis = 0 if q.shape[0] > 1 else 1 if k.shape[1] > 1 else 2
    middle = q.shape[axis] // 2 if axis != 1 else k.shape[1] // 2 * (q.shape[1] // k.shape[1])
    queries = mx.split(q, [middle], axis=axis)
    keys, values = ([own, own] if axis == 2 else mx.split(own, [own.shape[axis] // 2], axis=axis) for own in (k, v))
    masks: Any = [mask, mask]
    if mask is not None:
        mask = _additive(mask, q.shape[2], k.shape[2])
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        masks = mx.split(mask, [middle], axis=axis) if mask.shape[axis] > 1 else [mask, mask]
    parts = []
    for own_q, own_k, own_v, own_mask in zip(queries, keys, values, masks, strict=True):
        parts.append(attention(own_q, own_k, own_v, scale=scale, mask=own_mask))
        mx.eval(parts[-1])
    halved: mx.array = mx.concatenate(parts, axis=axis)
    return halved


def _additive(mask: Any, length: int, total: int) -> mx.array:
    """The mask as an addend of scores."""
    if isinstance(mask, str):  # "causal"
        mask = mx.arange(total - length, total)[:, None] >= mx.arange(total)[None]
    return mx.where(mask, 0.0, _MASKED) if mask.dtype == mx.bool_ else mask


_additive_of_step = once_per_step(_additive)
