"""Decoder layers of a step in few operations, on a Linux CPU with native kernels (native/decoder.cpp).

A step of one sequence of SmolLM2 is nine hundred operations, on which MLX and Python spend a third of its time. A layer
of the form that Llama, Mistral, Qwen 2 and Qwen 3 share is four here: what leads to its attention, the writing of keys
and of values, and the rest; eight with a quantised cache, which has three arrays of each. Its numbers are those of the
operations that it replaces.

Rule: a layer is known by its code, which is that of mlx-lm's llama or qwen3, and computes so where each part is of a
      class that has a native kernel, for a few tokens of sequences in slots. All else is left to its own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from mlxserver.engine.mlx import mx

import mlx.nn as nn

from mlxserver.engine.platform import cpu_attention, cpu_kernels, cpu_layers, cpu_stored, layer_forms
from mlxserver.engine.platform.native.extension import native

_MOST = 8  # tokens of a sequence that are computed so
# MLX prepares up to a hundred tasks ahead: with fewer layers it would write to slots of the next step while those of
# this one are to be read, and therefore copy them.
_LEAST = 8
_DENSE = (cpu_layers.Linear, cpu_stored.HalfLinear)

Linear = tuple[int, int, bool, list[mx.array]]  # bits (0: floats), group size, whether there is a bias; arrays


class _Layer:
    """A decoder layer in few operations; a mix-in of its class."""

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [rows, tokens, width]; the mask is that of the cache, which knows each row's tokens."""
        attention = self.self_attn
        norms = [self.input_layernorm, self.post_attention_layernorm, *_head_norms(attention)]
        is_wide = _is_wide(x) and all(_is_wide(norm["weight"]) for norm in norms)
        classes = _classes(cache) if is_wide and x.shape[1] <= _MOST else ()
        linears = _linears(self) if classes else []
        dim = linears[1][3][0].shape[0] // attention.n_kv_heads if linears else 0
        has_kernel = linears and all(cpu_attention.has_kernel(own.keys, own.values, dim) for own in classes)
        turns = _turns(attention.rope, cache.offset, x.shape[1], dim) if has_kernel else None
        if not turns:
            return cast(mx.array, super().__call__(x, mask, cache))  # type: ignore[misc]
        slots = [(own.keys, own.values, own.offset, own.offset.shape[0]) for own in classes]
        out, keys, values = native().decoder_layer(
            x,
            linears,
            [norm["weight"] for norm in norms],
            *turns,
            slots,
            attention.n_heads,
            attention.n_kv_heads,
            dim,
            attention.scale,
            norms[0].eps,
        )
        for own, own_keys, own_values in zip(classes, keys, values, strict=True):
            own.keys, own.values = own_keys, own_values
        return cast(mx.array, out)


def replace_layers(model: nn.Module) -> None:
    """Have the layers of a model that have this form compute so. Its linear layers have been replaced before."""
    known = [layer for layer in model.modules() if _is_known(layer)] if native() else []
    for layer in known if len(known) >= _LEAST else ():
        layer_forms.become(layer, _Layer)


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer has the form, as far as its code and what it is made of say it."""
    if not layer_forms.is_block(layer) or getattr(layer, "use_sliding", False):
        return False
    attention = layer.self_attn
    if not layer_forms.is_attention(attention) or not layer_forms.is_mlp(layer.mlp):
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention)]
    return all(type(norm) is cpu_layers.RMSNorm for norm in norms) and len({norm.eps for norm in norms}) == 1


def _head_norms(attention: nn.Module) -> list[nn.Module]:
    return [attention[name] for name in layer_forms.HEAD_NORMS if name in attention]


def _classes(cache: Any) -> Sequence[Any]:
    """The cache's capacity classes; none if it is of another kind."""
    classes: Sequence[Any] = getattr(cache, "classes", ())
    return classes if all(own.is_causal for own in classes) else ()


def _is_wide(array: Any) -> bool:
    return isinstance(array, mx.array) and array.dtype == mx.float32


def _turns(rope: nn.Module, offset: mx.array, tokens: int, dim: int) -> tuple[mx.array, mx.array] | None:
    """Cosines and sines of the rows' positions, for heads of so many dimensions; None where other ones are turned."""
    known = layer_forms.rotation(rope, cpu_layers.RoPE, dim)
    return cpu_kernels.turns(offset, tokens, dim, False, known.base, known.scale, known.freqs) if known else None


def _linears(layer: Any) -> list[Linear]:
    """The layer's projections in their order; none if one has no native kernel."""
    attention, mlp = layer.self_attn, layer.mlp
    parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    found = [_linear(part) for part in (*parts, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    return cast(list[Linear], found) if all(found) else []


def _linear(layer: nn.Module) -> Linear | None:
    bias = [layer["bias"]] if "bias" in layer else []
    if type(layer) is cpu_stored.QuantizedLinear:
        arrays = [layer["weight"], layer["scales"], layer["biases"], *bias]
        return layer.bits, layer.group_size, bool(bias), arrays
    if type(layer) in _DENSE:
        return 0, 0, bool(bias), [layer["weight"], *bias]
    return None
