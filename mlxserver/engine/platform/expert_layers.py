"""Expert layers with a bias, laid out for MLX's grouped products.

mlx-lm adds the bias with mx.expand_dims(), whose new axis has stride 1. The sum may take over that array with its
strides, depending on which of the two is still in use. MLX's CUDA backend (0.32) then takes this stride for the
distance of the rows in the next sorted mx.gather_mm(), and computes with wrong ones.
"""

from __future__ import annotations

from mlxserver.engine.mlx import mx, nn

from mlx_lm.models import switch_layers


class _LaidOut:
    """An expert layer whose input has the strides of its shape."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, in], an expert's index for each row -> [..., 1, out]."""
        product: mx.array = super().__call__(with_own_strides(x), indices, sorted_indices)  # type: ignore[misc]
        return product


class SwitchLinear(_LaidOut, switch_layers.SwitchLinear):  # type: ignore[misc]
    """mlx-lm's SwitchLinear."""


class QuantizedSwitchLinear(_LaidOut, switch_layers.QuantizedSwitchLinear):  # type: ignore[misc]
    """mlx-lm's QuantizedSwitchLinear."""


_CLASSES = {
    switch_layers.SwitchLinear: SwitchLinear,
    switch_layers.QuantizedSwitchLinear: QuantizedSwitchLinear,
}


def replace_expert_layers(model: nn.Module) -> None:
    """Have a model's expert layers compute with these classes where they have a bias."""
    for layer in model.modules():
        if "bias" in layer:
            layer.__class__ = _CLASSES.get(type(layer), type(layer))


def with_own_strides(x: mx.array) -> mx.array:
    """The array with the strides that its shape has in memory; nothing is copied if its values lie in order."""
    return x.reshape(-1, x.shape[-1]).reshape(x.shape)
