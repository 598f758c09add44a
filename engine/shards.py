"""A rank's share of a model: the parts that it keeps, as far as mlx-lm can divide its architecture.

tensor: each rank has a part of every layer, and all compute each step together. pipeline: each rank has some of the
layers, one rank after the other. The embeddings and the output layer are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.nn as nn

from engine.config import ModelSpec
from engine.memory import Estimate

Divide = Callable[[nn.Module], None]


def nothing(model: nn.Module) -> None:
    """The share of the process that leads: it needs what belongs to a model, and none of its weights."""
    model.clear()


def divider(spec: ModelSpec, group: Any) -> Divide:
    """What makes a model this rank's share, before its weights are read. It raises ValueError where that can't be."""
    divide = _by_tensor if spec.shard == "tensor" else _by_layers
    return lambda model: divide(model, group)


def share(estimate: Estimate, spec: ModelSpec, ranks: int) -> Estimate:
    """What rank 0's share of a model is expected to take: what is whole everywhere is small beside the rest."""
    if not spec.shard:
        return estimate
    return replace(estimate, weights=estimate.weights // ranks, cache=estimate.cache // ranks)


def _by_tensor(model: nn.Module, group: Any) -> None:
    if not hasattr(model, "shard"):
        raise ValueError(f"mlx-lm can't divide the layers of a {_type(model)!r}; expected shard = 'pipeline' or none")
    for layer in model.layers:
        heads = getattr(getattr(layer, "self_attn", None), "n_kv_heads", None)
        if heads and heads % group.size():
            raise ValueError(f"its {heads} heads of keys can't be divided by {group.size()} ranks")
    model.shard(group)


def _by_layers(model: nn.Module, group: Any) -> None:
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "pipeline"):
        raise ValueError(f"mlx-lm can't make a pipeline of a {_type(model)!r}; expected shard = 'tensor' or none")
    if len(model.layers) < group.size():
        raise ValueError(f"its {len(model.layers)} layers are fewer than the {group.size()} ranks")
    inner.pipeline(group)


def _type(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__name__))
