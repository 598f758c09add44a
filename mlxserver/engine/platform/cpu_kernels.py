"""CPU kernels: softmax, SwiGLU, GELU, attention, norms and rotary embedding for a Linux CPU.

MLX computes exponentials there one element at a time, so that softmax, attention and SwiGLU took four fifths of a
prompt's time. Here exp is made of additions, multiplications and one change of type, which vectorise: the method of the
Cephes library (Moshier 1984-1992), exact to 1e-7.

And MLX has no RMS norm and no rotary embedding (Su et al. 2021) there: it makes them of a dozen operations and of
thirty, in every layer. An operation costs microseconds however small it is: of a decode step of SmolLM2, 5,500 of them,
that was half. Here what depends on positions alone is computed once per step, and where the native kernels are built,
each of these is one operation, and so are attention, GELU and layer norm.

Rule: arrays that are not plain float32 are left to MLX's and mlx-lm's functions.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlx_lm.models import activations

from mlxserver.engine.platform import cpu_matmul
from mlxserver.engine.platform.attention_memory import SCORES_AT_ONCE
from mlxserver.engine.platform.native.extension import native

_COEFFICIENTS = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_MASKED = -1e30  # the score of a masked position
_FEW = 2048  # elements whose exponentials MLX computes faster than several operations begin
_FEW_TOKENS = 16  # of a sequence, whose attention is faster without blocks of keys

mlx_lm_swiglu = activations.swiglu


class _Thread(threading.local):
    is_stepwise = False


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


def softmax(a: mx.array, axis: Any = None, *, precise: bool = False, stream: Any = None) -> mx.array:
    """As mx.softmax."""
    if a.dtype != mx.float32 or axis not in (-1, a.ndim - 1) or a.size <= _FEW:
        plain: mx.array = mx.softmax(a, axis, precise=precise, stream=stream)
        return plain
    weights = _exp_of_difference(a, mx.max(a, axis=-1, keepdims=True))
    return weights / mx.sum(weights, axis=-1, keepdims=True)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, as mlx_lm.models.activations.swiglu."""
    if (kernels := native()) and gate.dtype == x.dtype == mx.float32 and gate.shape == x.shape:
        computed: mx.array = kernels.swiglu(gate, x)
        return computed
    if gate.dtype != mx.float32 or gate.size <= _FEW:
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
    if x.dtype != mx.float32 or x.size <= _FEW:
        plain: mx.array = nn.gelu(x)
        return plain
    mantissa, exponent = _compiled_bell(x)
    gated: mx.array = _bell_gate(mantissa, exponent.view(mx.float32), x)
    return gated


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
) -> mx.array:
    """As mx.fast.scaled_dot_product_attention: q [B, heads, L, dim], k and v [B, kv heads, T, dim]."""
    is_stepwise = _thread.is_stepwise and _are_computed(q, k, v)
    if q.dtype != mx.float32 or sinks is not None or options:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    if (attended := _native_attention(q, k, v, scale, mask)) is not None:
        return attended
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    if is_stepwise and batch * heads * length * k.shape[2] > SCORES_AT_ONCE and max(batch, groups, length) > 1:
        return _in_halves(q, k, v, scale, mask)
    # All query heads of one key head in one product.
    rows = q.reshape(batch, groups, heads // groups * length, dim) * scale
    scores = cpu_matmul.times_keys(rows, k)
    if mask is not None:
        hidden = (_additive_of_step if length == 1 else _additive)(mask, length, k.shape[2])
        if length == 1 and (hidden.ndim < 4 or hidden.shape[1] == 1):
            scores = scores + hidden
        else:
            scores = (scores.reshape(batch, heads, length, -1) + hidden).reshape(scores.shape)
    if scores.size <= _FEW:
        weighted = mx.softmax(scores, axis=-1) @ v
    else:
        weights = _exp_of_difference(scores, mx.max(scores, axis=-1, keepdims=True))
        weighted = cpu_matmul.times_values(weights, v) / mx.sum(weights, axis=-1, keepdims=True)
    return weighted.reshape(batch, heads, length, v.shape[3])


def _native_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array | None:
    """Attention as one operation; None where it has no kernel."""
    kernels = native()
    if kernels is None or not k.dtype == v.dtype == mx.float32:
        return None
    length, total = q.shape[2], k.shape[2]
    is_causal = isinstance(mask, str)
    hidden = None if mask is None or is_causal else _additive_of_step(mask, length, total)
    if hidden is not None:
        if hidden.dtype != mx.float32 or hidden.shape[-1] != total:
            return None
        hidden = hidden.reshape(*[1] * (4 - hidden.ndim), *hidden.shape)
    attended: mx.array
    if length >= _FEW_TOKENS and q.shape[3] <= kernels.MOST_DIM:
        attended = kernels.attend_in_blocks(q, k, v, scale, hidden, is_causal)
        return attended
    if length > cpu_matmul.NATIVE_ROWS or (hidden is not None and hidden.shape[1] > 1):
        return None
    if hidden is not None:
        hidden = mx.broadcast_to(hidden, (hidden.shape[0], 1, length, total))
    attended = kernels.attend(q, k, v, scale, hidden, is_causal)
    return attended


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
        options: dict[str, Any] = {
            "traditional": traditional,
            "base": base,
            "scale": scale,
            "offset": offset,
            "freqs": freqs,
        }
        return mx.fast.rope(a, dims, **options, stream=stream)
    cosines, sines = _turns(offset, a.shape[2], dims, traditional, base, scale, freqs)
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


def _once_per_step(function: Callable[..., Any]) -> Callable[..., Any]:
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


def _additive(mask: Any, length: int, total: int) -> mx.array:
    """The mask as an addend of scores."""
    if isinstance(mask, str):  # "causal"
        mask = mx.arange(total - length, total)[:, None] >= mx.arange(total)[None]
    return mx.where(mask, 0.0, _MASKED) if mask.dtype == mx.bool_ else mask


_additive_of_step = _once_per_step(_additive)


@_once_per_step
def _turns(
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


def _exp_of_difference(a: mx.array, b: mx.array) -> mx.array:
    mantissa, exponent = _compiled_difference(a, b)
    return mantissa * exponent.view(mx.float32)
