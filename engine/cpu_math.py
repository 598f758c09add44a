"""Faster exponentials for MLX on a Linux CPU, whose own computes them one element at a time.

Softmax, attention and SwiGLU took four fifths of a prompt's time there. exp is made of additions, multiplications and
one change of type, which vectorise: the method of the Cephes library (Moshier 1984-1992), exact to 1e-7.

Rule 1: install() puts these in the place of MLX's and mlx-lm's functions before a model module is imported, on a CPU.
Rule 2: whatever is not plain float32 is left to the functions that were there.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import activations

_COEFFICIENTS = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_HIDDEN = -1e30  # the score of what a mask hides

_mx_softmax = mx.softmax
_mx_attention = mx.fast.scaled_dot_product_attention
_mlx_lm_swiglu = activations.swiglu


def install() -> None:
    """Use these functions in this process."""
    mx.softmax = softmax
    mx.fast.scaled_dot_product_attention = attention
    activations.swiglu = swiglu


def softmax(a: mx.array, axis: Any = None, *, precise: bool = False, stream: Any = None) -> mx.array:
    """As mx.softmax."""
    if a.dtype != mx.float32 or axis not in (-1, a.ndim - 1):
        plain: mx.array = _mx_softmax(a, axis, precise=precise, stream=stream)
        return plain
    weights = _exp_of_difference(a, mx.max(a, axis=-1, keepdims=True))
    return weights / mx.sum(weights, axis=-1, keepdims=True)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, as mlx_lm.models.activations.swiglu."""
    if gate.dtype != mx.float32:
        plain: mx.array = _mlx_lm_swiglu(gate, x)
        return plain
    mantissa, exponent = _compiled_parts(-gate)
    gated: mx.array = _gate(mantissa, exponent.view(mx.float32), gate, x)
    return gated


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
) -> mx.array:
    """As mx.fast.scaled_dot_product_attention: q [B, heads, L, dim], k and v [B, kv heads, T, dim]."""
    if q.dtype != mx.float32 or sinks is not None or options:
        return _mx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    # All query heads of one key head in one product.
    scores = (q.reshape(batch, groups, heads // groups * length, dim) * scale) @ k.swapaxes(-1, -2)
    if mask is not None:
        masked = scores.reshape(batch, heads, length, -1) + _additive(mask, length, k.shape[2])
        scores = masked.reshape(scores.shape)
    weights = _exp_of_difference(scores, mx.max(scores, axis=-1, keepdims=True))
    weighted = (weights @ v) / mx.sum(weights, axis=-1, keepdims=True)
    return weighted.reshape(batch, heads, length, v.shape[3])


def _additive(mask: Any, length: int, total: int) -> mx.array:
    if isinstance(mask, str):  # "causal"
        mask = mx.arange(total - length, total)[:, None] >= mx.arange(total)[None]
    return mx.where(mask, 0.0, _HIDDEN) if mask.dtype == mx.bool_ else mask


def _parts(x: mx.array) -> tuple[mx.array, mx.array]:
    """exp(x) as a float32 near 1 and the bits of a power of two; their product is exp(x)."""
    x = mx.minimum(mx.maximum(x, -87.0), 88.0)
    power = (x * 1.44269504088896341 + 12582912.0) - 12582912.0  # rounds, as floats of that size are integers
    rest = x - power * 0.693359375 + power * 2.12194440e-4
    polynomial = mx.array(1.9875691500e-4)
    for coefficient in _COEFFICIENTS:
        polynomial = polynomial * rest + coefficient
    return polynomial * (rest * rest) + rest + 1.0, (power.astype(mx.int32) + 127) << 23


_compiled_parts = mx.compile(_parts, shapeless=True)
_compiled_difference = mx.compile(lambda a, b: _parts(a - b), shapeless=True)
_gate = mx.compile(lambda mantissa, power, gate, x: gate / (1.0 + mantissa * power) * x, shapeless=True)


def _exp_of_difference(a: mx.array, b: mx.array) -> mx.array:
    mantissa, exponent = _compiled_difference(a, b)
    return mantissa * exponent.view(mx.float32)
