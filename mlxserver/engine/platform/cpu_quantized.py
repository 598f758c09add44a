"""Layers whose quantized weights stay as they are stored, computed with by native kernels on a Linux CPU.

A product is that of dequantized float32 weights to rounding. Formats without a kernel (other bits than 4 and 8, other
modes than affine, experts) are dequantized (loading/loader.py), and so are all without the kernels.
"""

from __future__ import annotations

from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.native.formats import has_kernel


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
