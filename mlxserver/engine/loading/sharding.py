"""A rank's share of a model: the parts that it keeps, as far as mlx-lm can divide its architecture.

tensor: each rank has a part of every layer, and all compute each step together. pipeline: each rank has some of the
layers, one rank after the other. The embeddings and the output layer are whole on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mlxserver.engine.mlx import mx

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed, one_line
from mlxserver.engine.loading.estimate import Estimate
from mlxserver.engine.loading.sources import checkpoint_metadata

Divide = Callable[[nn.Module], None]

_KEY_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads")  # as mlx-lm's attentions call their number


class RankGroup(Protocol):
    """A rank's group among the others; MLX's groups are such."""

    def rank(self) -> int:
        """Its number, from 0."""

    def size(self) -> int:
        """How many there are."""


@dataclass(frozen=True, slots=True)
class RankPosition:
    """A group in no group: enough to divide a model of which nothing is computed."""

    number: int
    ranks: int

    def rank(self) -> int:
        """Its number, from 0."""
        return self.number

    def size(self) -> int:
        """How many there are."""
        return self.ranks


def nothing(model: nn.Module) -> None:
    """The share of the process that leads: it needs what belongs to a model, and none of its weights."""
    model.clear()


def divider(spec: ModelSpec, group: RankGroup) -> Divide:
    """What makes a model a rank's share, before its weights are read. It raises ValueError where that can't be."""
    divide = _by_tensor if spec.shard == "tensor" else _by_layers
    return lambda model: divide(model, group)


def alone(spec: ModelSpec) -> LoadFailed:
    """What becomes of a load that wants several ranks where there is one process."""
    return LoadFailed(spec.key, f"shard = {spec.shard!r} needs several ranks: start them with mlx.launch")


def share(estimate: Estimate, spec: ModelSpec, group: RankGroup) -> Estimate:
    """What a rank's share of a model is expected to take: its architecture is divided, and nothing computed.

    On a thread that has a stream of MLX. Raises LoadFailed where it can't be divided.
    """
    if not spec.shard:
        return estimate
    try:
        config = dict(checkpoint_metadata(spec.source).config)
        model_class, arguments = _get_classes(config)
        model = model_class(arguments.from_dict(config))
        weights, cache = _values(model), _cache_width(model)
        divider(spec, group)(model)
        part = replace(
            estimate,
            weights=estimate.weights * _values(model) // weights,
            cache=estimate.cache * _cache_width(model) // cache,
        )
    except Exception as error:  # what a broken config.json does to an architecture can be anything
        raise LoadFailed(spec.key, one_line(error)) from None
    finally:
        mx.random.seed(0)  # or else the weights, which nobody computes, would stay in this thread's random state
    return part


def _values(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def _cache_width(model: Any) -> int:
    """What the size of the cache is in proportion to: layers, times their heads of keys where those are divided."""
    return sum(_key_heads(layer) or 1 for layer in model.layers if layer is not None)


def _key_heads(layer: Any) -> int | None:
    """None where an attention keeps something else than heads of keys, which every rank keeps whole."""
    attention = getattr(layer, "self_attn", None)
    return next((int(heads) for name in _KEY_HEADS if (heads := getattr(attention, name, None))), None)


def _by_tensor(model: Any, group: RankGroup) -> None:
    if not hasattr(model, "shard"):
        raise ValueError(f"mlx-lm can't divide the layers of a {_type(model)!r}; expected shard = 'pipeline' or none")
    for layer in model.layers:
        if (heads := _key_heads(layer)) and heads % group.size():
            raise ValueError(f"its {heads} heads of keys can't be divided by {group.size()} ranks")
    model.shard(group)


def _by_layers(model: Any, group: RankGroup) -> None:
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "pipeline"):
        raise ValueError(f"mlx-lm can't make a pipeline of a {_type(model)!r}; expected shard = 'tensor' or none")
    if len(model.layers) < group.size():
        raise ValueError(f"its {len(model.layers)} layers are fewer than the {group.size()} ranks")
    if "NCCL_HOST_IP" in os.environ:  # as mlx.launch sets it for this backend
        raise ValueError("MLX's NCCL can't pass values from one rank to the next; expected shard = 'tensor'")
    inner.pipeline(group)


def _type(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__name__))
