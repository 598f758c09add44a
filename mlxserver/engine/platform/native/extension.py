"""Extension module with the native kernels, if it is built and computes rightly on this CPU."""

from __future__ import annotations

import functools
import importlib
import logging
import math
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform.native import build
from mlxserver.engine.platform.native.formats import BITS

log = logging.getLogger("engine")


@functools.cache
def native() -> Any:
    """The extension module; None where it is not built, or computes wrongly."""
    if not build.is_wanted():
        return None
    try:
        module = importlib.import_module(build.module_name())
    except ImportError:
        return None
    try:
        if is_right(module):
            return module
        log.warning("The native kernels compute wrongly on this CPU: it does without them.")
    except TypeError:  # the extension does not know MLX's arrays: nanobind's internals are not MLX's
        log.warning("The native kernels are not compatible with this MLX: it does without them.")
    return None


def is_right(module: Any) -> bool:
    """Whether small products of all paths, few rows and many, are those of float32 weights, and functions MLX's."""
    weight = mx.sin(mx.arange(34 * 96) * 0.7).reshape(34, 96)
    x = mx.cos(mx.arange(7 * 96) * 0.3).reshape(7, 96)
    for rows in (1, 2, 3, 7):
        for bits in BITS:
            parts = mx.quantize(weight, group_size=32, bits=bits)
            wide = mx.dequantize(*parts, group_size=32, bits=bits)
            if not _is_close(module.product(x[:rows], *parts, 32, bits), x[:rows], wide):
                return False
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            held = weight.astype(dtype)
            if not _is_close(module.dense(x[:rows], held), x[:rows], held.astype(mx.float32)):
                return False
    return _has_right_functions(module, x) and _has_right_recurrences(module, x) and _has_right_sampling(module, x)


def _has_right_functions(module: Any, x: mx.array) -> bool:
    """x: [7, 96]."""
    gate, weight = x[::-1], x[0]
    q, keys = x[:6, :19].reshape(1, 6, 1, 19), x[:, :38].reshape(1, 7, 2, 19).swapaxes(1, 2)
    angle = mx.array(0.7)
    cosines, sines = mx.full((1, 1, 7, 1, 48), mx.cos(angle)), mx.full((1, 1, 7, 1, 48), mx.sin(angle))
    turned = module.rotate(x[None, None], cosines, mx.concatenate([-sines, sines], axis=-2))[0, 0]
    held = mx.quantize(x[None, None], group_size=32, bits=8)
    wide = mx.dequantize(*held, group_size=32, bits=8)
    swapped = mx.concatenate([-x[:, 48:], x[:, :48]], axis=-1)
    pairs = (
        (module.rms_norm(x, weight, 1e-5), mx.fast.rms_norm(x, weight, 1e-5)),
        (module.swiglu(gate, x), gate * mx.sigmoid(gate) * x),
        (turned, x * mx.cos(angle) + swapped * mx.sin(angle)),
        (module.layer_norm(x, weight, weight, 1e-5), mx.fast.layer_norm(x, weight, weight, 1e-5)),
        (module.gelu(x), x * (1 + mx.erf(x * math.sqrt(0.5))) / 2),  # nn.gelu() would be compiled
        (module.swish(x, 1.5, 0.1), x * mx.sigmoid(1.5 * x + 0.1 * x**3)),
        (module.attend_in_blocks(q, keys, keys, 0.2), mx.fast.scaled_dot_product_attention(q, keys, keys, scale=0.2)),
        (module.attend(q, keys, keys, 0.2), mx.fast.scaled_dot_product_attention(q, keys, keys, scale=0.2)),
        (
            module.attend(x[None, None], held, held, 0.2),
            mx.fast.scaled_dot_product_attention(x[None, None], wide, wide, scale=0.2),
        ),
        *zip(module.quantize(x[None, None], 32, 8), held, strict=True),
        (module.dequantize(*held, 32, 8), wide),
    )
    return all(bool(mx.allclose(own, expected, rtol=1e-4, atol=1e-4)) for own, expected in pairs)


def _has_right_recurrences(module: Any, x: mx.array) -> bool:
    """x: [7, 96]. Of a state of zeros, behind one token and behind seven."""
    keys, values, gates = x[:, None, :20], x[:, None, 20:59], x[:, 60:61]
    rate, bias = x[0, :1], x[1, :1]
    step, beta = mx.logaddexp(gates + bias, 0), mx.sigmoid(gates)
    mamba = delta = mx.zeros((1, 39, 20))
    for n in range(7):
        decay = mx.exp(-mx.exp(rate) * step[n])
        mamba = decay * mamba + step[n] * values[n, :, :, None] * keys[n, :, None]
        delta = decay * delta
        known = (delta * keys[n, :, None]).sum(axis=-1, keepdims=True)
        delta = delta + beta[n] * (values[n, :, :, None] - known) * keys[n, :, None]
        if n in (0, 6):
            own = [part[None, : n + 1] for part in (keys, values, gates)]
            scanned = module.mamba(own[1], own[0], own[0], own[2], rate, bias, bias, 0.0, 100.0, None, None)
            ruled = module.gated_delta(own[0], own[0], own[1], own[2], own[2], rate, bias, 1.0, None, None, None)
            found = (mamba * keys[n, :, None]).sum(axis=-1) + bias * values[n]
            pairs = (scanned[1][0], mamba), (scanned[0][0, n], found), (ruled[1][0], delta)
            if not all(bool(mx.allclose(one, other, rtol=1e-4, atol=1e-4)) for one, other in pairs):
                return False
    return True


def _has_right_sampling(module: Any, x: mx.array) -> bool:
    """x: [7, 96]."""
    share, every = mx.full((7, 1), 0.4), mx.full((7, 96), True)
    plain, first = mx.array([[1.0, 1.0, 0.0, 96.0]] * 7), mx.array([[1.0, 0.9, 0.0, 1.0]] * 7)
    likeliest, weights = mx.argmax(x, axis=-1), mx.softmax(x, axis=-1)
    penalties, bits = mx.array([[0.5, 0.25, 2.0]] * 7), mx.full((7, 12), 0x55, mx.uint8)
    pairs = (
        (module.argmax(x), likeliest),
        (module.top(x, 3), mx.argsort(-x, axis=-1)[:, :3]),
        (module.draw(x, plain, share), mx.sum(mx.cumsum(weights, axis=-1) <= share, axis=-1)),
        (module.draw(x, first, share), likeliest),
        (module.log_sum(x), mx.logsumexp(x, axis=-1, keepdims=True)),
        (module.mask(x, bits), mx.where(mx.arange(96) % 2 == 0, x, -mx.inf)),
        (module.penalize(x, mx.ones((7, 96)), every, penalties), mx.where(x > 0, x / 2, x * 2) - 0.75),
    )
    return all(bool(mx.allclose(own, expected, rtol=1e-4, atol=1e-4)) for own, expected in pairs)


def _is_close(product: mx.array, x: mx.array, weight: mx.array) -> bool:
    return bool(mx.allclose(product, x @ weight.T, rtol=1e-4, atol=1e-4))
