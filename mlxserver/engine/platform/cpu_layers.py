"""Layers of a loaded model that compute with cpu_kernels.py, cpu_attention.py and cpu_matmul.py on a Linux CPU.

MLX's own layers (linear, embedding, norms, SiLU, GELU, rotary embedding) become subclasses of theirs: same parameters,
another forward pass. What mlx-lm's model code calls by name has no layer to replace: attention, SwiGLU, SiLU and GELU,
the softmax of expert gates, and the norms and rotary embeddings of its own classes. For that code, `mx` and `nn` are
copies of mlx.core and mlx.nn with our functions in them. MLX itself stays as it is, for everything else in the process.

Rule: replace_functions() runs after the model's code has been imported and before its first forward pass.
"""

from __future__ import annotations

import functools
from types import ModuleType

from mlxserver.engine.mlx import mx

import mlx.nn as nn
from mlx_lm.models import switch_layers

from mlxserver.engine.platform import cpu_attention, cpu_kernels, cpu_matmul
from mlxserver.engine.platform.model_code import MLX_LM, MLX_VLM, rebind
from mlxserver.engine.platform.native.extension import native

LINE = 64  # bytes


class Linear(nn.Linear):  # type: ignore[misc]
    """nn.Linear with the products of cpu_matmul.py."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        product = cpu_matmul.product(x, self["weight"], self.get("bias"))
        if product is None:
            plain: mx.array = super().__call__(x)
            return plain
        return product


class Embedding(nn.Embedding):  # type: ignore[misc]
    """nn.Embedding, as an output layer with the products of cpu_matmul.py."""

    def as_linear(self, x: mx.array) -> mx.array:
        """x [..., dim] -> [..., vocab]."""
        product = cpu_matmul.product(x, self["weight"])
        if product is None:
            plain: mx.array = super().as_linear(x)
            return plain
        return product


class SwitchLinear(switch_layers.SwitchLinear):  # type: ignore[misc]
    """mlx-lm's SwitchLinear with a product per expert, where MLX's grouped one has a product per row on a CPU."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, in], an expert's index for each row -> [..., 1, out]."""
        if "bias" in self or x.dtype != mx.float32:
            plain: mx.array = super().__call__(x, indices, sorted_indices)
            return plain
        product: mx.array = native().expert_dense(x, self["weight"], indices, sorted_indices)
        return product


class RMSNorm(nn.RMSNorm):  # type: ignore[misc]
    """nn.RMSNorm in one compiled operation."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dim]."""
        return cpu_kernels.rms_norm(x, self["weight"], self.eps)


class LayerNorm(nn.LayerNorm):  # type: ignore[misc]
    """nn.LayerNorm in one operation."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dim]."""
        return cpu_kernels.layer_norm(x, self.get("weight"), self.get("bias"), self.eps)


class RoPE(nn.RoPE):  # type: ignore[misc]
    """nn.RoPE with the angles of a step computed once."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x [B, heads, L, dim], offset one for all or [B]."""
        return cpu_kernels.rope(
            x, self.dims, traditional=self.traditional, base=self.base, scale=self.scale, offset=offset
        )


class GELU(nn.GELU):  # type: ignore[misc]
    """nn.GELU, exact or approximated, in one operation."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dim]."""
        if self._approx == "none":
            return cpu_kernels.gelu(x)
        return cpu_kernels.gelu_fast_approx(x) if self._approx == "fast" else cpu_kernels.gelu_approx(x)


class SiLU(nn.SiLU):  # type: ignore[misc]
    """nn.SiLU in one operation."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dim]."""
        return cpu_kernels.silu(x)


def replace_layers(model: nn.Module) -> None:
    """Have a model's layers compute with these classes. Layers of MLX's subclasses stay as they are."""
    classes: dict[type, type] = {nn.RMSNorm: RMSNorm, nn.LayerNorm: LayerNorm, nn.RoPE: RoPE}
    classes |= {nn.GELU: GELU, nn.SiLU: SiLU}
    if cpu_matmul.has_products():
        classes |= {nn.Linear: Linear, nn.Embedding: Embedding}
    if native():
        classes |= {switch_layers.SwitchLinear: SwitchLinear}
        _align_weights(model)
    for layer in model.modules():
        layer.__class__ = classes.get(type(layer), type(layer))


def _align_weights(model: nn.Module) -> None:
    """Have matrices of whole lines of the caches begin with one, or else most vectors of them would be of two lines."""
    aligned: dict[int, mx.array] = {}
    for layer in model.modules():
        for name, array in list(layer.items()):
            if isinstance(array, mx.array) and array.ndim > 1 and array.shape[-1] * array.itemsize % LINE == 0:
                layer[name] = aligned.setdefault(id(array), native().aligned(array))


def replace_functions() -> None:
    """Have the model code of mlx-lm and mlx-vlm, as far as it is imported, call our functions in place of MLX's."""
    both = MLX_LM, MLX_VLM
    rebind("mx", mx, _core(), both)
    rebind("nn", nn, _layers(), both)
    rebind("swiglu", cpu_kernels.mlx_lm_swiglu, cpu_kernels.swiglu, both)


@functools.cache
def _core() -> ModuleType:
    """mlx.core with our functions."""
    core, fast = ModuleType(mx.__name__), ModuleType(mx.fast.__name__)
    vars(fast).update(
        vars(mx.fast),
        scaled_dot_product_attention=cpu_attention.attention,
        rms_norm=cpu_kernels.rms_norm,
        layer_norm=cpu_kernels.layer_norm,
        rope=cpu_kernels.rope,
    )
    vars(core).update(vars(mx), fast=fast, softmax=cpu_kernels.softmax)
    return core


@functools.cache
def _layers() -> ModuleType:
    """mlx.nn with our functions."""
    layers = ModuleType(nn.__name__)
    vars(layers).update(
        vars(nn),
        silu=cpu_kernels.silu,
        gelu=cpu_kernels.gelu,
        gelu_approx=cpu_kernels.gelu_approx,
        gelu_fast_approx=cpu_kernels.gelu_fast_approx,
    )
    return layers
