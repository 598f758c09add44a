"""Convolutions over a few tokens, channel by channel, as sums of products.

cuDNN plans a convolution anew for each number of tokens, and a chunk of a prompt may have any.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mlxserver.engine.mlx import mx

import mlx.nn as nn


class ShortConv1d(nn.Conv1d):  # type: ignore[misc]
    """nn.Conv1d with a group per channel, and neither stride, padding nor dilation."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, tokens + taps - 1, channels] -> [B, tokens, channels]."""
        weight = self["weight"][..., 0].T  # [taps, channels]
        taps = weight.shape[0]
        tokens = x.shape[1] - taps + 1
        summed: mx.array = _summed([x[:, tap : tap + tokens] for tap in range(taps)], list(weight))
        return summed + self["bias"] if "bias" in self else summed


def replace_convolutions(model: nn.Module) -> None:
    """Have the convolutions of a model that this is true of compute that way."""
    for layer in model.modules():
        if type(layer) is nn.Conv1d and _is_short(layer):
            layer.__class__ = ShortConv1d


def _is_short(layer: nn.Conv1d) -> bool:
    channels, _, depth = layer["weight"].shape
    return (layer.groups, depth, layer.stride, layer.padding, layer.dilation) == (channels, 1, 1, 0, 1)


@partial(mx.compile, shapeless=True)
def _summed(parts: Sequence[mx.array], weights: Sequence[mx.array]) -> mx.array:
    """Sum of the parts, [B, tokens, channels], each times its weights, [channels]; in float32."""
    total = parts[0].astype(mx.float32) * weights[0].astype(mx.float32)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part.astype(mx.float32) * weight.astype(mx.float32)
    return total.astype(parts[0].dtype)
