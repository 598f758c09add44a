"""Layers and functions of a loaded model on a Linux CPU."""

import sys

from mlxserver.engine.mlx import mx, nn

import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import base, llama

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import loader
from mlxserver.engine.platform import cpu_attention, cpu_kernels, cpu_layers, cpu_matmul, device
from mlxserver.engine.platform.cpu_layers import replace_functions, replace_layers
from tests.support.architectures import CONFIGS, random_model

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not device.is_cpu(), reason="they are for Linux CPUs")
TOKENS = mx.array([[5, 6, 7, 8, 200]])


def close(ours, theirs):
    return np.allclose(np.array(ours), np.array(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1, 1), (2, 1), (3, 2), (8, 1), (9, 1), (2, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_that_of_mlx(shape, bias):
    layer, x = nn.Linear(576, 1536, bias=bias), mx.random.normal((*shape, 576), key=mx.random.key(1))
    expected = layer(x)
    layer.__class__ = cpu_layers.Linear
    assert layer(x).shape == expected.shape
    assert close(layer(x), expected)


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_an_output_layer_is_that_of_mlx(rows):
    layer, x = nn.Embedding(49152, 64), mx.random.normal((rows, 1, 64), key=mx.random.key(1))
    expected = layer.as_linear(x)
    layer.__class__ = cpu_layers.Embedding
    assert close(layer.as_linear(x), expected)


def test_other_types_are_left_to_mlx():
    layer = nn.Linear(576, 1536)
    layer.set_dtype(mx.float16)
    layer.__class__ = cpu_layers.Linear
    assert layer(mx.ones((1, 576), mx.float16)).dtype == mx.float16


def test_norms_activations_and_rotary_embeddings_are_those_of_mlx():
    x = mx.random.normal((2, 4, 3, 32), key=mx.random.key(1))
    for layer, arguments in (
        (nn.RMSNorm(32), ()),
        (nn.LayerNorm(32), ()),
        (nn.LayerNorm(32, affine=False), ()),
        *((nn.GELU(approx), ()) for approx in ("none", "precise", "tanh", "fast")),
        (nn.SiLU(), ()),
        (nn.RoPE(32), (7,)),
        (nn.RoPE(32, traditional=True, scale=0.5), ()),
    ):
        expected = layer(x, *arguments)
        replace_layers(layer)
        assert type(layer).__module__ == cpu_layers.__name__
        assert close(layer(x, *arguments), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_gives_the_same_logits_with_the_same_parameters(name):
    model = random_model(name)
    expected = model(TOKENS)
    names = [name for name, _ in tree_flatten(model.parameters())]
    replace_functions()
    replace_layers(model)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert np.allclose(np.array(model(TOKENS)), np.array(expected), rtol=1e-3, atol=1e-3)


def test_a_loaded_model_uses_them(tiny_llama_path):
    model = loader.load(ModelSpec("tiny", str(tiny_llama_path))).model
    kinds = {type(layer) for layer in model.modules()}
    assert {cpu_layers.RMSNorm, cpu_layers.RoPE} <= kinds
    assert (cpu_layers.Linear in kinds) == cpu_matmul.has_products()
    assert not kinds & {nn.RMSNorm, nn.RoPE}
    assert llama.swiglu is cpu_kernels.swiglu
    assert base.mx.fast.scaled_dot_product_attention is cpu_attention.attention
    assert base.mx.softmax is cpu_kernels.softmax
    assert llama.nn.gelu_approx is cpu_kernels.gelu_approx


def test_layers_can_still_be_quantized(tiny_llama_path):
    model = loader.load(ModelSpec("tiny", str(tiny_llama_path))).model
    nn.quantize(model, group_size=32, bits=8)
    assert any(isinstance(layer, nn.QuantizedLinear) for layer in model.modules())
    assert model(TOKENS).shape == (1, 5, model.args.vocab_size)


def test_mlx_itself_stays_as_it_is(tiny_llama_path):
    loader.load(ModelSpec("tiny", str(tiny_llama_path)))
    ours = {cpu_kernels.softmax, cpu_attention.attention, cpu_kernels.rms_norm, cpu_kernels.rope}
    ours |= {cpu_kernels.silu, cpu_kernels.gelu, cpu_kernels.gelu_approx, cpu_kernels.gelu_fast_approx}
    assert not ours & {mx.softmax, mx.fast.scaled_dot_product_attention, mx.fast.rms_norm, mx.fast.rope}
    assert not ours & {nn.silu, nn.gelu, nn.gelu_approx, nn.gelu_fast_approx}
    assert nn.Linear.__call__.__module__ == "mlx.nn.layers.linear"
