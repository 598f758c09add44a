"""Expert layers with a bias: the strides that MLX's grouped products take for the distance of rows."""

from mlxserver.engine.mlx import mx

import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import loader
from mlxserver.engine.platform import expert_layers
from mlxserver.engine.platform.expert_layers import replace_expert_layers, with_own_strides
from tests.support.architectures import BASE, write_random_model
from tools.zoo import models


def strides(array):
    mx.eval(array)
    return tuple(stride // 4 for stride in np.array(array, copy=False).strides)


def test_an_inserted_axis_has_the_stride_of_its_place():
    """MLX gives it stride 1, which is no distance of rows."""
    rows = mx.random.normal((6, 8))
    inserted = mx.expand_dims(rows, -2)
    assert strides(inserted) == (8, 1, 1)
    assert strides(with_own_strides(inserted)) == (8, 8, 1)
    assert mx.array_equal(with_own_strides(inserted), inserted)


def test_values_out_of_order_are_put_in_order():
    rows = mx.random.normal((8, 2, 6)).transpose(2, 1, 0)
    assert mx.array_equal(with_own_strides(rows), rows)


def experts(*, is_quantized):
    layer = SwitchGLU(64, 64, num_experts=4, bias=True)
    for part in (layer.gate_proj, layer.up_proj, layer.down_proj):
        part.bias = mx.random.normal(part.bias.shape)
    if is_quantized:
        nn.quantize(layer, group_size=32, bits=4)
    return layer


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_layers_compute_what_mlx_lms_do(is_quantized, tokens):
    layer = experts(is_quantized=is_quantized)
    x, chosen = mx.random.normal((1, tokens, 64)), mx.random.randint(0, 4, (1, tokens, 2))
    expected = layer(x, chosen)
    replace_expert_layers(layer)
    own = expert_layers.QuantizedSwitchLinear if is_quantized else expert_layers.SwitchLinear
    assert type(layer.down_proj) is own
    assert mx.allclose(layer(x, chosen), expected, atol=1e-5)


def test_layers_without_a_bias_stay_as_they_are():
    layer = SwitchGLU(64, 64, num_experts=4)
    before = type(layer.down_proj)
    replace_expert_layers(layer)
    assert type(layer.down_proj) is before


def test_a_loaded_model_has_them(tmp_path):
    config = models.config("gpt_oss")
    source = write_random_model(tmp_path / "m", BASE | config)
    model = loader.load(ModelSpec("m", str(source))).model
    assert {type(layer.mlp.experts.down_proj) for layer in model.layers} == {expert_layers.SwitchLinear}
