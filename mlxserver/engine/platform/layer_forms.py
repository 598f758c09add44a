"""Form of the decoder layers that kernels of our own compute, that of Llama, Mistral, Qwen 2 and Qwen 3.

Rule: a part of a layer has the form where its forward pass is the code of mlx-lm's llama or qwen3, and calls the same
      functions. What it is made of is for its kernels to see.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

from mlxserver.engine.mlx import mx

import mlx.nn as nn
from mlx_lm.models import llama, qwen3, rope_utils

HEAD_NORMS = ("q_norm", "k_norm")  # of an attention: the norms of queries and of keys, both or none


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Rotary embedding of whole heads, whose pairs are a half apart. base: None where freqs, [dim / 2], are given."""

    base: float | None
    scale: float
    freqs: mx.array | None


def is_block(layer: Any) -> bool:
    """Whether a layer is two sums, of its input with its attention and with its MLP, each behind a norm."""
    return _is_same(type(layer), llama.TransformerBlock)


def is_mlp(mlp: Any) -> bool:
    """Whether an MLP is three projections around SwiGLU."""
    return _is_same(type(mlp), llama.MLP)


def is_attention(attention: Any) -> bool:
    """Whether an attention projects and rotates queries and keys, normalised before if it has norms (HEAD_NORMS)."""
    known: Any = qwen3.Attention if HEAD_NORMS[0] in attention else llama.Attention
    return _is_same(type(attention), known)


def rotation(rope: Any, plain: type, dim: int) -> Rotation | None:
    """The rotation of heads of so many dimensions; None where other ones, or other pairs, are turned.

    plain: the class of one without frequencies of its own.
    """
    if getattr(rope, "dims", None) != dim or getattr(rope, "traditional", True):
        return None
    own: Any = type(rope)
    if own is plain:
        return Rotation(rope.base, rope.scale, None)
    return Rotation(None, 1.0, rope._freqs) if own is rope_utils.Llama3RoPE else None


def become(module: nn.Module, form: type) -> None:
    """Have a module be of its class with a mix-in, whose forward pass comes first."""
    module.__class__ = _class_of(type(module), form)  # type: ignore[arg-type]


@functools.cache
def _class_of(own: type, form: type) -> type:
    return type(own.__name__, (form, own), {"__module__": own.__module__})


def _is_same(own: type, known: type[nn.Module]) -> bool:
    """Whether a class's forward pass is that of a known one: the same code, which calls the same functions."""
    if own is known:
        return True
    a, b = (cast(FunctionType, each.__call__) for each in (own, known))
    if not (isinstance(a, FunctionType) and isinstance(b, FunctionType)):
        return False
    codes = [(f.__code__.co_code, f.__code__.co_names, f.__code__.co_consts) for f in (a, b)]
    return codes[0] == codes[1] and all(
        a.__globals__.get(name) is b.__globals__.get(name) for name in a.__code__.co_names
    )
