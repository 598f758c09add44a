"""Functions of a step's logits, [batch, vocab]: native ones on a CPU that has them, MLX's elsewhere; and on CUDA the
draw of cuda_sampling.py.

On a CPU MLX sorts a row to find its largest values, computes exponentials one element at a time, and makes penalties of
a dozen operations: for sixteen rows of 49,152 tokens each of these took 10 to 30 ms, beside a forward pass of 50.

Rule: logits that are not float32 are left to MLX's functions, except by draw().
"""

from __future__ import annotations

from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import cuda_sampling
from mlxserver.engine.platform.native.extension import native


def draw(logits: mx.array, settings: mx.array, uniforms: mx.array) -> mx.array:
    """As cuda_sampling.draw(), where the policy has a sampling kernel."""
    if kernels := native():
        return kernels.draw(logits.astype(mx.float32), settings, uniforms)  # type: ignore[no-any-return]
    return cuda_sampling.draw(logits, settings, uniforms)


def argmax(logits: mx.array) -> mx.array:
    """The first of the likeliest tokens of each row, [batch] of uint32."""
    if kernels := _native_for(logits):
        return kernels.argmax(logits)  # type: ignore[no-any-return]
    return mx.argmax(logits, axis=-1)


def top(logits: mx.array, count: int) -> mx.array:
    """The `count` likeliest tokens of each row, in any order, [batch, count] of uint32."""
    if (kernels := _native_for(logits)) and count <= kernels.MOST_TOP:
        return kernels.top(logits, count)  # type: ignore[no-any-return]
    return mx.argpartition(-logits, kth=max(count - 1, 0), axis=-1)[:, :count]


def log_sum(logits: mx.array) -> mx.array:
    """Logarithm of the sum of each row's exponentials, [batch, 1]."""
    if kernels := _native_for(logits):
        return kernels.log_sum(logits)  # type: ignore[no-any-return]
    return mx.logsumexp(logits, axis=-1, keepdims=True)


def mask(logits: mx.array, allowed: mx.array) -> mx.array:
    """The logits of allowed tokens, and -inf.

    allowed: [batch, at least vocab / 8] of uint8, a bit per token, the first one in the lowest.
    """
    if kernels := _native_for(logits):
        return kernels.mask(logits, allowed)  # type: ignore[no-any-return]
    bits = (allowed[:, :, None] >> mx.arange(8, dtype=mx.uint8)) & 1
    is_allowed = bits.reshape(len(bits), -1)[:, : logits.shape[1]].astype(mx.bool_)
    return mx.where(is_allowed, logits, -mx.inf)


def penalize(logits: mx.array, generated: mx.array, prompted: mx.array, penalties: mx.array) -> mx.array:
    """The logits after the penalties of each row.

    generated: [batch, vocab] of float32, how often each token was generated. prompted: [batch, vocab] of bool, whether
    the prompt has it. penalties: [batch, 3] of float32, for frequency, presence and repetition.
    """
    if kernels := _native_for(logits):
        return kernels.penalize(logits, generated, prompted, penalties)  # type: ignore[no-any-return]
    frequency, presence, repetition = mx.split(penalties, 3, axis=-1)
    was_generated = generated > 0
    repeated = mx.where(logits > 0, logits / repetition, logits * repetition)
    logits = mx.where(was_generated | prompted, repeated, logits)
    return logits - generated * frequency - was_generated * presence


def _native_for(logits: mx.array) -> Any:
    return native() if logits.dtype == mx.float32 else None
