"""Layers whose quantized weights stay as they are stored, computed with by native kernels on a Linux CPU.

A product is that of dequantized float32 weights to rounding. Without the kernels (no compiler at set-up) no layer is
replaced. Formats without a kernel (other bits than 4 and 8, other modes than affine) are left to MLX.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlxserver.engine.platform.native.build import module_name


@functools.cache
def native() -> Any:
    """The extension module with the kernels; None where it has not been built."""
    if sys.platform != "linux":
        return None
    try:
        return importlib.import_module(module_name())
    except ImportError:
        return None


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


def _product(layer: Any, x: mx.array) -> mx.array:
    product: mx.array = native().product(
        x, layer["weight"], layer["scales"], layer["biases"], layer.group_size, layer.bits
    )
    return product


def replace_layers(model: nn.Module) -> None:
    """Have a model's quantized layers compute with the kernels, and all other floats be float32, if all have one."""
    classes = {nn.QuantizedLinear: QuantizedLinear, nn.QuantizedEmbedding: QuantizedEmbedding}
    layers = [layer for layer in model.modules() if "scales" in layer]
    if not layers or native() is None or not all(type(layer) in classes and _has_kernel(layer) for layer in layers):
        return
    kept = {id(layer): (layer.scales, layer.biases) for layer in layers}
    model.set_dtype(mx.float32)
    for layer in layers:
        layer.scales, layer.biases = kept[id(layer)]
        layer.__class__ = classes[type(layer)]


def _has_kernel(layer: Any) -> bool:
    is_affine = getattr(layer, "mode", "affine") == "affine"
    return is_affine and layer.bits in (4, 8) and layer.group_size in (32, 64, 128)
