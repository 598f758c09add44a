"""Sharding: a rank's share of a model, as far as mlx-lm can divide its architecture.

tensor: each rank has a part of every layer, and all compute each step together. pipeline: each rank has some of the
layers, and computes after the rank before it. Embeddings and output layer are whole on every rank.
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

_KEY_HEADS = (
    "n_kv_heads",
    "num_key_value_heads",
    "num_kv_heads",
)  # names of their number in mlx-lm's attention classes


class RankGroup(Protocol):
    """A group of ranks, as seen by one of them; MLX's groups are such."""

    def rank(self) -> int:
        """Its number, from 0."""

    def size(self) -> int:
        """The number of ranks."""


@dataclass(frozen=True, slots=True)
class RankPosition:
    """Position of a rank without a group: enough to divide a model of which nothing is computed."""

    number: int
    ranks: int

    def rank(self) -> int:
        """Its number, from 0."""
        return self.number

    def size(self) -> int:
        """The number of ranks."""
        return self.ranks


def nothing(model: nn.Module) -> None:
    """Divide for the leader, which needs the model's facts and none of its weights."""
    model.clear()


def divider(spec: ModelSpec, group: RankGroup) -> Divide:
    """The function that reduces a model to a rank's share before its weights are read. It may raise ValueError."""
    divide = _by_tensor if spec.shard == "tensor" else _by_layers
    return lambda model: divide(model, group)


def alone(spec: ModelSpec) -> LoadFailed:
    """The error of a sharded load in a process that is not one of several ranks."""
    return LoadFailed(spec.key, f"shard = {spec.shard!r} needs several ranks: start them with mlx.launch")


def share(estimate: Estimate, spec: ModelSpec, group: RankGroup) -> Estimate:
    """The estimate of a rank's share of a model, whose architecture is divided without computing anything.

    To be called on a thread that has an MLX stream. Raises LoadFailed if the architecture can't be divided.
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
    except Exception as error:  # a broken config.json can make an architecture raise anything
        raise LoadFailed(spec.key, one_line(error)) from None
    finally:
        mx.random.seed(0)  # or else the weights, which are never computed, would stay in this thread's random state
    return part


def _values(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def _cache_width(model: Any) -> int:
    """A number in proportion to the size of the KV cache: layers, times their KV heads where those are divided."""
    return sum(_key_heads(layer) or 1 for layer in model.layers if layer is not None)


def _key_heads(layer: Any) -> int | None:
    """KV heads of a layer; None if its attention caches something else, which every rank keeps whole."""
    attention = getattr(layer, "self_attn", None)
    return next((int(heads) for name in _KEY_HEADS if (heads := getattr(attention, name, None))), None)


def _by_tensor(model: Any, group: RankGroup) -> None:
    if not hasattr(model, "shard"):
        raise ValueError(f"mlx-lm can't divide the layers of a {_type(model)!r}; expected shard = 'pipeline' or none")
    for layer in model.layers:
        if (heads := _key_heads(layer)) and heads % group.size():
            raise ValueError(f"its {heads} KV heads can't be divided by {group.size()} ranks")
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
