"""CPU kernels: softmax, SwiGLU, SiLU, GELU, norms and rotary embedding for a Linux CPU; cpu_attention.py has attention.

MLX computes exponentials there one element at a time, so that softmax, attention and SwiGLU took four fifths of a
prompt's time. Here exp is made of additions, multiplications and one change of type, which vectorise: the method of the
Cephes library (Moshier 1984-1992), exact to 1e-7.

And MLX has no RMS norm and no rotary embedding (Su et al. 2021) there: it makes them of a dozen operations and of
thirty, in every layer. An operation costs microseconds however small it is: of a decode step of SmolLM2, 5,500 of them,
that was half. Here what depends on positions alone is computed once per step, and where the native kernels are built,
each of these is one operation, and so are SiLU, GELU and layer norm.

Rule: arrays that are not plain float32 are left to MLX's and mlx-lm's functions.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlx_lm.models import activations

from mlxserver.engine.platform.native.extension import native

_COEFFICIENTS = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_TWICE_ROOT = 2 * math.sqrt(2 / math.pi)
FEW = 2048  # elements whose exponentials MLX computes faster than several operations begin

mlx_lm_swiglu = activations.swiglu


def softmax(a: mx.array, axis: Any = None, *, precise: bool = False, stream: Any = None) -> mx.array:
    """As mx.softmax."""
    if a.dtype != mx.float32 or axis not in (-1, a.ndim - 1) or a.size <= FEW:
        plain: mx.array = mx.softmax(a, axis, precise=precise, stream=stream)
        return plain
    weights = exp_of_difference(a, mx.max(a, axis=-1, keepdims=True))
    return weights / mx.sum(weights, axis=-1, keepdims=True)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, as mlx_lm.models.activations.swiglu."""
    if (kernels := native()) and gate.dtype == x.dtype == mx.float32 and gate.shape == x.shape:
        computed: mx.array = kernels.swiglu(gate, x)
        return computed
    if gate.dtype != mx.float32 or gate.size <= FEW:
        plain: mx.array = mlx_lm_swiglu(gate, x)
        return plain
    mantissa, exponent = _compiled_parts(-gate)
    gated: mx.array = _gate(mantissa, exponent.view(mx.float32), gate, x)
    return gated


def gelu(x: mx.array) -> mx.array:
    """As nn.gelu: x times the normal distribution's share below it."""
    if x.dtype == mx.float32 and (kernels := native()):
        computed: mx.array = kernels.gelu(x)
        return computed
    if x.dtype != mx.float32 or x.size <= FEW:
        plain: mx.array = nn.gelu(x)
        return plain
    mantissa, exponent = _compiled_bell(x)
    gated: mx.array = _bell_gate(mantissa, exponent.view(mx.float32), x)
    return gated


def silu(x: mx.array) -> mx.array:
    """As nn.silu."""
    return _swish(x, 1.0, 0.0, nn.silu)


def gelu_approx(x: mx.array) -> mx.array:
    """As nn.gelu_approx. (1 + tanh(u)) / 2 is the sigmoid of 2 * u."""
    return _swish(x, _TWICE_ROOT, 0.044715 * _TWICE_ROOT, nn.gelu_approx)


def gelu_fast_approx(x: mx.array) -> mx.array:
    """As nn.gelu_fast_approx."""
    return _swish(x, 1.702, 0.0, nn.gelu_fast_approx)


def _swish(x: mx.array, slope: float, cubic: float, plain: Callable[[mx.array], mx.array]) -> mx.array:
    """x times the sigmoid of slope * x + cubic * x^3, which `plain` computes without native kernels."""
    kernels = native() if x.dtype == mx.float32 else None
    computed: mx.array = kernels.swish(x, slope, cubic) if kernels else plain(x)
    return computed


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, *, stream: Any = None) -> mx.array:
    """As mx.fast.rms_norm: x [..., dim], weight [dim]."""
    if weight is None or not x.dtype == weight.dtype == mx.float32:
        return mx.fast.rms_norm(x, weight, eps, stream=stream)
    kernels = native()
    normed: mx.array = kernels.rms_norm(x, weight, eps) if kernels else _norm(x.shape[-1], eps)(x, weight)
    return normed


def layer_norm(
    x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, *, stream: Any = None
) -> mx.array:
    """As mx.fast.layer_norm: x [..., dim], weight and bias [dim]."""
    arrays = [x, weight] if bias is None else [x, weight, bias]
    if (kernels := native()) and all(array is not None and array.dtype == mx.float32 for array in arrays):
        normed: mx.array = kernels.layer_norm(x, weight, bias, eps)
        return normed
    return mx.fast.layer_norm(x, weight, bias, eps, stream=stream)


def rope(
    a: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
    stream: Any = None,
) -> mx.array:
    """As mx.fast.rope: a [B, heads, L, dims], offset one for all or [B]."""
    if a.dtype != mx.float32 or a.ndim != 4 or a.shape[-1] != dims:
        return mx.fast.rope(
            a, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs, stream=stream
        )
    cosines, sines = turns(offset, a.shape[2], dims, traditional, base, scale, freqs)
    if traditional:
        pairs = a.reshape(*a.shape[:-1], dims // 2, 2)
        turned = _turned(pairs, pairs[..., ::-1], cosines, sines)
    elif kernels := native():
        return kernels.rotate(a, cosines, sines)  # type: ignore[no-any-return]
    else:
        pairs = a.reshape(*a.shape[:-1], 2, dims // 2)
        turned = _turned(pairs, pairs[..., ::-1, :], cosines, sines)
    rotated: mx.array = turned.reshape(a.shape)
    return rotated


class _LastCall(threading.local):
    """The last call of a function on this thread: all layers of a step make the same one."""

    arguments: tuple[Any, ...] = ()
    result: Any = None


def once_per_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remember the last call. Arrays are the same if they are one object."""
    last = _LastCall()

    def remembered(*arguments: Any) -> Any:
        if len(arguments) != len(last.arguments) or not all(map(_is_same, arguments, last.arguments)):
            result = function(*arguments)
            if not any(isinstance(value, mx.array) for value in arguments):
                mx.eval(result)  # a later call may come when the stream that would compute it is gone
            last.arguments, last.result = arguments, result
        return last.result

    return remembered


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int | float | str) and type(one) is type(other) and one == other)


@once_per_step
def turns(
    offset: int | mx.array,
    length: int,
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
    freqs: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Cosines and signed sines of the angles by which pairs of dimensions are turned at each position.

    They fit [B, heads, L, 2, dims / 2], or [B, heads, L, dims / 2, 2] in the traditional order.
    """
    if freqs is None:
        assert base is not None
        speeds = mx.exp(mx.arange(dims // 2) * (-2 * math.log(base) / dims))
    else:
        speeds = 1 / freqs
    offsets = offset.reshape(-1, 1) if isinstance(offset, mx.array) else mx.array([[offset]])
    positions = (offsets + mx.arange(length)) * scale
    angles = mx.expand_dims(positions[:, None, :, None] * speeds, -1 if traditional else -2)
    sines = mx.sin(angles)
    return mx.cos(angles), mx.concatenate([-sines, sines], axis=-1 if traditional else -2)


@functools.cache
def _norm(width: int, eps: float) -> Any:
    def norm(x: mx.array, weight: mx.array) -> mx.array:
        mean = mx.sum(x * x, axis=-1, keepdims=True) * (1 / width)
        return x * mx.rsqrt(mean + eps) * weight

    return mx.compile(norm, shapeless=True)


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
_turned = mx.compile(lambda pairs, swapped, cosines, sines: pairs * cosines + swapped * sines, shapeless=True)
_gate = mx.compile(lambda mantissa, power, gate, x: gate / (1.0 + mantissa * power) * x, shapeless=True)


_compiled_bell = mx.compile(lambda x: _parts(-0.5 * x * x), shapeless=True)


def _gelu_of_bell(mantissa: mx.array, power: mx.array, x: mx.array) -> mx.array:
    """gelu(x), where mantissa * power is exp(-x * x / 2); with erf() to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    t = 1.0 / (1.0 + mx.abs(x) * (0.3275911 * math.sqrt(0.5)))
    polynomial = mx.array(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = polynomial * t + coefficient
    tail = 0.5 * mx.clip(x, -40.0, 40.0) * polynomial * t * mantissa * power
    return mx.where(x > 0.0, x - tail, tail)


_bell_gate = mx.compile(_gelu_of_bell, shapeless=True)


def exp_of_difference(a: mx.array, b: mx.array) -> mx.array:
    """exp(a - b), of float32."""
    mantissa, exponent = _compiled_difference(a, b)
    return mantissa * exponent.view(mx.float32)
