"""Extension module with the native kernels, if it is built and computes rightly on this CPU."""

from __future__ import annotations

import functools
import importlib
import logging
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
    """Whether small products of all paths, few rows and many, are those of float32 weights."""
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
    return True


def _is_close(product: mx.array, x: mx.array, weight: mx.array) -> bool:
    return bool(mx.allclose(product, x @ weight.T, rtol=1e-4, atol=1e-4))
