"""Layers whose quantized weights stay as they are stored, computed with by native kernels on a Linux CPU.

A product is that of dequantized float32 weights to rounding. Formats without a kernel (other bits than 4 and 8, other
modes than affine, experts) are dequantized (loading/loader.py), and so are all without the kernels.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlxserver.engine.platform.native import build
from mlxserver.engine.platform.native.formats import BITS, has_kernel

log = logging.getLogger("engine")


@functools.cache
def native() -> Any:
    """The extension module with the kernels; None where it is not built, or computes wrongly."""
    if not build.is_wanted():
        return None
    try:
        module = importlib.import_module(build.module_name())
    except ImportError:
        return None
    try:
        if _is_right(module):
            return module
        log.warning("The native kernels compute wrongly on this CPU: quantized weights are dequantized.")
    except TypeError:  # the extension does not know MLX's arrays: nanobind's internals are not MLX's
        log.warning("The native kernels are not compatible with this MLX: quantized weights are dequantized.")
    return None


def _is_right(module: Any) -> bool:
    """Whether small products of both paths, few rows and many, are those of dequantized weights."""
    weight = mx.sin(mx.arange(34 * 96) * 0.7).reshape(34, 96)
    x = mx.cos(mx.arange(7 * 96) * 0.3).reshape(7, 96)
    for bits in BITS:
        parts = mx.quantize(weight, group_size=32, bits=bits)
        expected = x @ mx.dequantize(*parts, group_size=32, bits=bits).T
        for rows in (1, 2, 3, 7):
            if not mx.allclose(module.product(x[:rows], *parts, 32, bits), expected[:rows], rtol=1e-4, atol=1e-4):
                return False
    return True


class QuantizedLinear(nn.QuantizedLinear):  # type: ignore[misc]
    """nn.QuantizedLinear with float32 outputs."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        product = _product(self, x)
        return product + self["bias"] if "bias" in self else product


class QuantizedEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]
    """nn.QuantizedEmbedding with float32 outputs."""

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens [...] -> [..., dim]."""
        scales, biases = (self[name][x].astype(mx.float32) for name in ("scales", "biases"))
        return mx.dequantize(self["weight"][x], scales, biases, group_size=self.group_size, bits=self.bits)

    def as_linear(self, x: mx.array) -> mx.array:
        """x [..., dim] -> [..., vocab]."""
        return _product(self, x)


_CLASSES = {nn.QuantizedLinear: QuantizedLinear, nn.QuantizedEmbedding: QuantizedEmbedding}


def _product(layer: Any, x: mx.array) -> mx.array:
    product: mx.array = native().product(
        x, layer["weight"], layer["scales"], layer["biases"], layer.group_size, layer.bits
    )
    return product


def replace_layers(model: nn.Module) -> None:
    """Have a model's quantized layers compute with the kernels, where they have one, and all its other floats be
    float32.
    """
    layers = [layer for layer in model.modules() if type(layer) in _CLASSES and _has_kernel(layer)]
    kept = [(layer, layer.scales, layer.biases) for layer in layers]
    model.set_dtype(mx.float32)
    for layer, scales, biases in kept:
        layer.scales, layer.biases = scales, biases
        layer.__class__ = _CLASSES[type(layer)]


def is_replaced(layer: nn.Module) -> bool:
    """Whether a layer computes with the kernels."""
    return isinstance(layer, QuantizedLinear | QuantizedEmbedding)


def _has_kernel(layer: Any) -> bool:
    types = {layer.scales.dtype, layer.biases.dtype} if "biases" in layer else set()
    is_typed = len(types) == 1 and types <= {mx.float32, mx.float16, mx.bfloat16}
    return is_typed and has_kernel(getattr(layer, "mode", "affine"), layer.bits, layer.group_size)
