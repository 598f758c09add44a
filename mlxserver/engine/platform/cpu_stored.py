"""Layers whose weights stay as they are stored, quantized or of 16 bits, for native kernels on a Linux CPU.

A product is that of float32 weights to rounding. Formats without a kernel (other bits than 4 and 8, other modes than
affine) are dequantized to float32 (loading/loader.py), and so are all without the kernels.
"""

from __future__ import annotations

import functools
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlx_lm.models import switch_layers

from mlxserver.engine.platform import cpu_layers
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.native.formats import has_kernel

_HALVES = (mx.float16, mx.bfloat16)


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


class QuantizedSwitchLinear(switch_layers.QuantizedSwitchLinear):  # type: ignore[misc]
    """mlx-lm's QuantizedSwitchLinear with float32 outputs."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, in], an expert's index for each row -> [..., 1, out]."""
        parts = (self["weight"], self["scales"], self["biases"])
        product = native().expert_product(x, *parts, indices, self.group_size, self.bits, sorted_indices)
        return _with_bias(self, product, indices)


class _Half:
    """A layer with weights of 16 bits, self["weight"], and float32 outputs."""

    @property
    def weight(self) -> mx.array:
        """The weights in float32. Once they have been computed they are the layer's: model code then computes with them
        itself, in every step. Their type and shape alone cost nothing.
        """
        layer: Any = self
        wide: mx.array | None = vars(layer).get("_wide")
        if wide is None:
            wide = layer["weight"].astype(mx.float32)
            object.__setattr__(layer, "_wide", wide)  # not among its parameters
        elif native().is_computed(wide):
            del layer._wide
            layer.__class__ = _WIDE[type(layer)]
            layer["weight"] = wide
        return wide

    def _extra_repr(self: Any) -> str:
        return f"{self['weight'].shape}, {self['weight'].dtype}"


class HalfLinear(_Half, cpu_layers.Linear):
    """nn.Linear with weights of 16 bits."""


class HalfEmbedding(_Half, cpu_layers.Embedding):
    """nn.Embedding with weights of 16 bits."""

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens [...] -> [..., dim]."""
        rows: mx.array = self["weight"][x].astype(mx.float32)
        return rows


class HalfSwitchLinear(_Half, switch_layers.SwitchLinear):  # type: ignore[misc]
    """mlx-lm's SwitchLinear with weights of 16 bits."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, in], an expert's index for each row -> [..., 1, out]."""
        return _with_bias(self, native().expert_dense(x, self["weight"], indices, sorted_indices), indices)


_HALF = {nn.Linear: HalfLinear, nn.Embedding: HalfEmbedding, switch_layers.SwitchLinear: HalfSwitchLinear}
_WIDE = {
    HalfLinear: cpu_layers.Linear,
    HalfEmbedding: cpu_layers.Embedding,
    HalfSwitchLinear: cpu_layers.SwitchLinear,
}
_CLASSES = _HALF | {
    nn.QuantizedLinear: QuantizedLinear,
    nn.QuantizedEmbedding: QuantizedEmbedding,
    switch_layers.QuantizedSwitchLinear: QuantizedSwitchLinear,
}
# Models whose forward pass multiplies with the weight of a tied embedding, not with as_linear().
_TIED = {f"mlx_lm.models.{name}" for name in ("llama4_text", "seed_oss")}


class _TiedHead:
    """A model of _TIED whose logits are those of as_linear()."""

    def __call__(self: Any, inputs: mx.array, cache: Any = None) -> mx.array:
        """Tokens [B, L] -> logits [B, L, vocab]."""
        if not self.args.tie_word_embeddings:
            own: mx.array = super().__call__(inputs, cache)  # type: ignore[misc]
            return own
        logits: mx.array = self.model.embed_tokens.as_linear(self.model(inputs, cache))
        return logits


@functools.cache
def _with_tied_head(model_class: type) -> type:
    return type(model_class.__name__, (_TiedHead, model_class), {"__module__": model_class.__module__})


def _with_bias(layer: Any, product: mx.array, indices: mx.array) -> mx.array:
    return product + mx.expand_dims(layer["bias"][indices], -2) if "bias" in layer else product


def _product(layer: Any, x: mx.array) -> mx.array:
    product: mx.array = native().product(
        x, layer["weight"], layer["scales"], layer["biases"], layer.group_size, layer.bits
    )
    return product


def replace_layers(model: nn.Module) -> None:
    """Have a model's layers compute with their weights as they are, where the kernels can, and all its other floats be
    float32.
    """
    adapted = _adapted(model)
    layers = [(layer, names) for layer in model.modules() if (names := _kept(layer)) and id(layer) not in adapted]
    kept = [(layer, {name: layer[name] for name in names}) for layer, names in layers]
    model.set_dtype(mx.float32)
    for layer, arrays in kept:
        layer.update(arrays)
        layer.__class__ = _CLASSES[type(layer)]
    if type(model).__module__ in _TIED:
        model.__class__ = _with_tied_head(type(model))  # type: ignore[arg-type]


def values_in_layers(model: nn.Module) -> int:
    """Number of weights that stay as they are if they have 16 bits."""
    return sum(layer["weight"].size for layer in model.modules() if type(layer) in _HALF)


def is_replaced(layer: nn.Module) -> bool:
    """Whether a layer's weights stay quantized."""
    return isinstance(layer, QuantizedLinear | QuantizedEmbedding | QuantizedSwitchLinear)


def _adapted(model: nn.Module) -> set[int]:
    """Layers that adapters will be added to, which 16 bits would round."""
    adapters = [layer for layer in model.modules() if hasattr(layer, "fuse")]
    layers = [layer for adapter in adapters for layer in adapter.children().values()]
    return {id(layer) for layer in layers if type(layer) in _HALF}


def _kept(layer: Any) -> tuple[str, ...]:
    """Names of a layer's floats that stay as they are."""
    if type(layer) in _HALF:
        return ("weight",) if layer["weight"].dtype in _HALVES else ()
    is_kept = type(layer) in _CLASSES and _has_kernel(layer)
    return ("scales", "biases") if is_kept else ()


def _has_kernel(layer: Any) -> bool:
    types = {layer.scales.dtype, layer.biases.dtype} if "biases" in layer else set()
    is_typed = len(types) == 1 and types <= {mx.float32, *_HALVES}
    return is_typed and has_kernel(getattr(layer, "mode", "affine"), layer.bits, layer.group_size)
