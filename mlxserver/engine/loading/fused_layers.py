"""Fused layers: decoder layers that compute a decode step in fewer operations (platform/cuda_layers.py).

A sum is computed with the norm that reads it: that of a layer's attention with the norm behind it, and what a layer
returns with the input norm of the next one, or the model's last norm. Queries, keys and values are split, normalised,
rotated and laid out at once, where they are one product (fused_projections.py).

Rule 1: parts are known by their code (platform/layer_forms.py), and computed so where the cache asks for it, for few
        tokens per row. All else is left to their own code.
Rule 2: a norm takes what was computed ahead only if its input is that very array. A model that does something else with
        what a layer returns has its own norm of that.

On CUDA MLX takes a third as long for an operation that only looks at an array in another way as for one that launches a
kernel, and a product of [rows, tokens, width] with a transposed matrix has three of these around it. So the tokens of
all rows lie in one dimension within a layer, and linear layers keep their matrices transposed (turned_linear.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from mlxserver.engine.mlx import mx

import mlx.nn as nn

from mlxserver.engine.kv_cache.ragged import attention
from mlxserver.engine.loading.fused_projections import whole_product
from mlxserver.engine.platform import layer_forms
from mlxserver.engine.platform.cuda_layers import HeadNorms, add_norm, split_heads
from mlxserver.engine.platform.turned_linear import turn_linears

_MOST = 16  # tokens per row
_NORMS = ("input_layernorm", "post_attention_layernorm")


class _Norm(nn.RMSNorm):  # type: ignore[misc]
    """nn.RMSNorm that may have been computed along with its input."""

    _ahead: _Ahead | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dim]."""
        normed = self._taken(x)
        return normed if normed.ndim == x.ndim else normed.reshape(x.shape)

    def flat(self, x: mx.array) -> mx.array:
        """x [..., dim] -> [tokens, dim]."""
        return _flat(self._taken(x))

    def _taken(self, x: mx.array) -> mx.array:
        ahead, self._ahead = self._ahead, None
        return ahead.normed if ahead and ahead.sum is x else cast(mx.array, super().__call__(x))

    def of_sum(self, x: mx.array, r: mx.array) -> mx.array:
        """x + r, whose norm is there when it is asked for. r: [tokens, dim], or as x."""
        self._ahead = _Ahead(*add_norm(x, r, self["weight"], self.eps))
        return self._ahead.sum


@dataclass(frozen=True, slots=True, eq=False)
class _Ahead:
    """A sum and its norm."""

    sum: mx.array
    normed: mx.array


@dataclass(frozen=True, slots=True, eq=False)
class _Next:
    """The norm that reads what a layer returns; not a part of the layer."""

    norm: _Norm


class _Block:
    """A decoder layer with the norms of its sums; a mix-in of its class."""

    _next: _Next | None = None

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [rows, tokens, width]."""
        if not _is_fused(x, cache):
            return cast(mx.array, super().__call__(x, mask, cache))  # type: ignore[misc]
        attention, mlp, norm = self.self_attn, self.mlp, self.post_attention_layernorm
        is_flat = isinstance(attention, _Attention)
        h = norm.of_sum(x, attention((self.input_layernorm.flat if is_flat else self.input_layernorm)(x), mask, cache))
        r = mlp((norm.flat if layer_forms.is_mlp(mlp) else norm)(h))
        return cast(mx.array, self._next.norm.of_sum(h, r) if self._next else h + r.reshape(h.shape))


class _Attention:
    """Attention whose queries, keys and values are made at once of their product; a mix-in of its class."""

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [rows, tokens, width], or [rows * tokens, width] of a layer that is computed so."""
        is_flat = x.ndim == 2
        split = _split(self, _flat(x), cache) if is_flat or _is_fused(x, cache) else None
        if split is None:
            whole = x.reshape(cache.offset.shape[0], -1, x.shape[-1]) if is_flat else x
            return cast(mx.array, super().__call__(whole, mask, cache))  # type: ignore[misc]
        queries, keys, values = split
        keys, values = cache.update_and_fetch(keys, values)
        output = attention(queries, keys, values, cache, self.scale, mask)
        if output.shape[2] > 1:
            output = output.transpose(0, 2, 1, 3)
        return cast(mx.array, self.o_proj(output.reshape(*x.shape[:-1], -1)))


def fuse_layers(model: nn.Module) -> None:
    """Have the layers of a model that have this form compute so where their cache asks for it."""
    modules = list(model.modules())
    for module in modules:
        if layer_forms.is_block(module) and all(_is_norm(module.get(name)) for name in _NORMS):
            layer_forms.become(module, _Block)
            turn_linears(module)
            for name in _NORMS:
                _become_norm(module[name])
        if layer_forms.is_attention(module):
            layer_forms.become(module, _Attention)
    for layer, norm in (pair for module in modules for pair in _readers(module)):
        if isinstance(layer, _Block) and _is_norm(norm):
            _become_norm(norm)
            layer._next = _Next(norm)


def has_fused_layers(model: nn.Module) -> bool:
    """Whether a model has layers that can compute so."""
    return any(isinstance(module, _Block | _Attention) for module in model.modules())


def _readers(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The layers of a stack, each with the norm that reads what it returns, as far as it looks like that."""
    layers = module.get("layers")
    if isinstance(layers, list) and layers:
        for layer, behind in pairwise(layers):
            yield layer, behind.get("input_layernorm") if isinstance(behind, nn.Module) else None
        yield layers[-1], module.get("norm")


def _flat(x: mx.array) -> mx.array:
    """[..., dim] -> [tokens, dim], without an operation if it is so."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _is_fused(x: mx.array, cache: Any) -> bool:
    return getattr(cache, "fuses_layers", False) and x.shape[1] <= _MOST


def _split(own: Any, x: mx.array, cache: Any) -> tuple[mx.array, mx.array, mx.array] | None:
    """Queries, keys and values; None where they are left to the layer's own code."""
    norms = [own[name] for name in layer_forms.HEAD_NORMS if name in own]
    if not all(_is_norm(norm) and norm.eps == norms[0].eps for norm in norms):
        return None
    if (product := whole_product([own.q_proj, own.k_proj, own.v_proj], x)) is None:
        return None
    dim = product.shape[-1] // (own.n_heads + 2 * own.n_kv_heads)
    if (rotation := layer_forms.rotation(own.rope, nn.RoPE, dim)) is None:
        return None
    head_norms = HeadNorms(norms[0]["weight"], norms[1]["weight"], norms[0].eps) if norms else None
    return split_heads(product, own.n_heads, own.n_kv_heads, rotation, cache.offset, head_norms)


def _is_norm(norm: Any) -> bool:
    return type(norm) in (nn.RMSNorm, _Norm)


def _become_norm(norm: nn.RMSNorm) -> None:
    norm.__class__ = _Norm
