"""Products with quantized weights that a model computes, by shape, as its checkpoint stores them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mlxserver.engine.mlx import mx

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlxserver.engine.loading.metadata import first_stated, model_arguments

_ACTIVE_KEYS = (  # of a config.json: experts that a token meets
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"),
)
_ARRAYS = ("weight", "scales", "biases", "global_scale")

Array = tuple[str, tuple[int, ...], mx.Dtype]  # its name, shape and type


@dataclass(frozen=True, slots=True)
class QuantizedProduct:
    """Product with quantized weights [out, in], or [experts, out, in].

    arrays: of the weights as they are stored. half: the type of the same ones in 16 bits. active: experts that a token
    meets; 0 without experts.
    """

    arrays: tuple[Array, ...]
    bits: int
    group_size: int
    mode: str
    half: mx.Dtype
    active: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights."""
        scales = next(shape for name, shape, _ in self.arrays if name == "scales")
        return (*scales[:-1], scales[-1] * self.group_size)

    def arrays_of(self, is_wide: bool) -> tuple[Array, ...]:
        """The arrays of the weights in 16 bits, or as they are stored."""
        return (("weight", self.shape, self.half),) if is_wide else self.arrays

    def bytes(self, is_wide: bool) -> int:
        """Size of the weights."""
        return sum(prod(shape) * dtype.size for _, shape, dtype in self.arrays_of(is_wide))


def half_type(layer: nn.Module) -> mx.Dtype:
    """Type of a quantized layer's weights in 16 bits: that of its scales if it has so many, or else bfloat16."""
    dtype: mx.Dtype = layer.scales.dtype
    return dtype if dtype in (mx.float16, mx.bfloat16) else mx.bfloat16


def quantized_products(model: nn.Module) -> Counter[QuantizedProduct]:
    """How many products of each shape a step has. Nothing is computed.

    None where the number of experts that a token meets is not known.
    """
    active = first_stated(model_arguments(model), _ACTIVE_KEYS)
    layers = list(_products(model))
    if not active and any(isinstance(layer, QuantizedSwitchLinear) for layer in layers):
        return Counter()
    return Counter(_product(layer, active) for layer in layers)


def _products(model: nn.Module) -> Iterator[nn.Module]:
    """Quantized layers that are products. An embedding is one where no linear layer has its number of outputs."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.QuantizedLinear))]
    outputs = {layer.weight.shape[0] for layer in layers}
    for layer in model.modules():
        is_head = isinstance(layer, nn.QuantizedEmbedding) and layer.weight.shape[0] not in outputs
        if is_head or isinstance(layer, (nn.QuantizedLinear, QuantizedSwitchLinear)):
            yield layer


def _product(layer: nn.Module, active: int) -> QuantizedProduct:
    arrays = [(name, layer.get(name)) for name in _ARRAYS]
    return QuantizedProduct(
        tuple((name, array.shape, array.dtype) for name, array in arrays if array is not None),
        layer.bits,
        layer.group_size,
        layer.mode,
        half_type(layer),
        active if isinstance(layer, QuantizedSwitchLinear) else 0,
    )
