"""Fused projections: those of one input as one product (queries, keys and values; gate and up).

Rule 1: the weights lie below each other in one matrix, so each output is what it was; only rounding may differ.
Rule 2: a model's own code stays: it still calls each projection, and the first call computes all of them.

On an H100 a step of 32 sequences is bound by the host, and preparing a product is the most expensive part of it: with
64 products instead of 112, a step of the 1B shape took 6.8 ms where it took 7.3 (medians of 300 steps on one machine).
The merged column-parallel layers of vLLM do the same.

A loaded model can be switched between both forms, to measure the other one (runners/measured_policies.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

from mlxserver.engine.mlx import mx

import mlx.nn as nn

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.platform import cpu_layers, cpu_stored
from mlxserver.engine.platform.turned_linear import TurnedLinear

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_LINEAR = (nn.Linear, TurnedLinear, cpu_layers.Linear, cpu_stored.HalfLinear, cpu_stored.QuantizedLinear)


class _Product:
    """One linear layer in place of several, with its latest outputs until the last of them is taken."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layer = _like(layers[0])
        for name in self.layer:
            self.layer[name] = mx.concatenate([layer[name] for layer in layers])
        self._cuts = list(accumulate(len(layer["weight"]) for layer in layers))[:-1]
        self._input: mx.array | None = None
        self._outputs: Sequence[mx.array] = ()

    @property
    def count(self) -> int:
        """Number of outputs."""
        return len(self._cuts) + 1

    @property
    def is_taken(self) -> bool:
        """Whether all outputs have been taken."""
        return self._input is None

    def parts(self) -> list[nn.Linear]:
        """A layer for each output, which shares the memory of this one."""
        layers = [_like(self.layer) for _ in range(self.count)]
        for name in self.layer:
            for layer, array in zip(layers, mx.split(self.layer[name], self._cuts), strict=True):
                layer[name] = array
        return layers

    def take(self, index: int, x: mx.array) -> mx.array:
        """An output of the common input, [..., in] -> [..., out]."""
        if x is not self._input:
            self._input, self._outputs = x, cast(list[mx.array], mx.split(self.layer(x), self._cuts, axis=-1))
        output = self._outputs[index]
        if index == len(self._cuts):
            self._input, self._outputs = None, ()
        return output


class _Part(nn.Module):  # type: ignore[misc]
    """A projection whose output is a part of a product. The first part owns the parameters."""

    def __init__(self, product: _Product, index: int) -> None:
        super().__init__()
        self._product, self._index = product, index
        if index == 0:
            self.layer = product.layer

    def __call__(self, x: mx.array) -> mx.array:
        return self._product.take(self._index, x)

    def layers(self) -> list[nn.Linear]:
        """The projections that the product computes, each with its part of the parameters."""
        return self._product.parts()


@dataclass(frozen=True, slots=True)
class Swap:
    """A layer for a place in a model, or the one that was in it."""

    module: nn.Module
    name: str
    layer: nn.Module


def fuse_projections(model: nn.Module) -> list[Swap]:
    """Fuse the projections of a model where it calls all of them, in their order. Nothing is computed.

    Returns the projections that they were, for swap(). Raises what the model raises, as it was.
    """
    groups = []
    for module in list(model.modules()):
        for names, layers in _fusable(module):
            product = _Product(layers)
            groups.append((product, [Swap(module, name, layer) for name, layer in zip(names, layers, strict=True)]))
            for index, name in enumerate(names):
                module[name] = _Part(product, index)
    try:
        model(mx.zeros((1, 1), dtype=mx.uint32), cache=caches.new_cache(model))
    except Exception:
        swap([one for _, group in groups for one in group])
        raise
    for product, group in groups:
        if not product.is_taken:
            swap(group)
    return [one for product, group in groups if product.is_taken for one in group]


def whole_product(layers: Sequence[nn.Module], x: mx.array) -> mx.array | None:
    """Outputs of projections beside each other, of one product: [..., in] -> [..., sum of outs].

    None where these are not all the projections that a product computes, in their order.
    """
    parts = [(layer._product, layer._index) for layer in layers if isinstance(layer, _Part)]
    if not parts or len(parts) != len(layers):
        return None
    product = parts[0][0]
    if parts != [(product, index) for index in range(product.count)]:
        return None
    return cast(mx.array, product.layer(x))


def part_projections(model: nn.Module) -> list[Swap]:
    """Undo fuse_projections(): the projections share the memory of the products. Returns these, for swap()."""
    fused = []
    for module in list(model.modules()):
        for names in _FUSED:
            parts = [module.get(name) for name in names]
            if all(isinstance(part, _Part) for part in parts):
                for name, part, layer in zip(names, parts, parts[0].layers(), strict=True):
                    fused.append(Swap(module, name, part))
                    module[name] = layer
    return fused


def switchable_bytes(model: nn.Module, is_fused: bool) -> int:
    """Size of the projections that the other form has otherwise; 0 where there are none."""
    arrays = {id(array): array.nbytes for layer in _switchable(model, is_fused) for array in layer.values()}
    return sum(arrays.values())


def _switchable(model: nn.Module, is_fused: bool) -> Iterator[nn.Linear]:
    for module in model.modules():
        if is_fused and isinstance(module, _Part) and "layer" in module:
            yield module.layer
        elif not is_fused:
            yield from (layer for _, layers in _fusable(module) for layer in layers)


def swap(layers: Sequence[Swap]) -> list[Swap]:
    """Put layers in their places. Returns those that were there."""
    former = [Swap(one.module, one.name, one.module[one.name]) for one in layers]
    for one in layers:
        one.module[one.name] = one.layer
    return former


def _like(layer: nn.Linear) -> nn.Linear:
    """A layer of the same class; its parameters are to be set."""
    if isinstance(layer, cpu_stored.QuantizedLinear):
        return copy.copy(layer)
    like = nn.Linear(1, 1, bias="bias" in layer)
    like.__class__ = type(layer)
    return like


def _fusable(module: nn.Module) -> Iterator[tuple[tuple[str, ...], list[nn.Linear]]]:
    """The projections of a module that one product can compute: no sharded or adapted layers, and of quantized ones
    those with a native kernel.
    """
    for names in _FUSED:
        layers = [module.get(name) for name in names]
        if all(type(layer) in _LINEAR for layer in layers) and len(set(map(_kind, layers))) == 1:
            yield names, layers


def _kind(layer: nn.Linear) -> tuple[object, ...]:
    """What layers of one product have in common."""
    arrays = tuple((name, array.shape[1:], array.dtype) for name, array in sorted(layer.items()))
    return type(layer), getattr(layer, "bits", None), getattr(layer, "group_size", None), arrays
