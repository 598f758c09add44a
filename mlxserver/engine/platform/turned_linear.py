"""Linear layers that keep a view of their transposed matrix, which is an operation less in each product."""

from __future__ import annotations

from dataclasses import dataclass

from mlxserver.engine.mlx import mx

import mlx.nn as nn


@dataclass(frozen=True, slots=True, eq=False)
class _Turned:
    """A matrix, and a view of it."""

    weight: mx.array
    transposed: mx.array


class TurnedLinear(nn.Linear):  # type: ignore[misc]
    """nn.Linear whose matrix is transposed once."""

    _turned: _Turned | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        weight = self["weight"]
        if self._turned is None or self._turned.weight is not weight:
            self._turned = _Turned(weight, weight.T)
            mx.eval(self._turned.transposed)  # or else a compiled step would transpose it in each call
        by = self._turned.transposed
        product: mx.array = mx.addmm(self["bias"], x, by) if "bias" in self else x @ by
        return product


def turn_linears(module: nn.Module) -> None:
    """Have the linear layers of a module keep their matrices so."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = TurnedLinear
