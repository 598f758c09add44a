"""Fused projections give what they gave alone."""

from mlxserver.engine.mlx import mx

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading.fused_projections import fuse_projections, part_projections
from mlxserver.engine.platform import cpu_stored
from mlxserver.engine.platform.native.extension import native

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 50,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
TOKENS = mx.array([[3, 1, 4, 1, 5]], dtype=mx.uint32)


def make(kind):
    mx.random.seed(7)
    model = kind.Model(kind.ModelArgs(model_type=kind.__name__.rpartition(".")[2], **SHAPE))
    mx.eval(model.parameters())
    return model


def logits(model):
    cache = caches.new_cache(model)
    return mx.concatenate([model(TOKENS, cache=cache), model(TOKENS[:, :1], cache=cache)], axis=1)


def parameter_bytes(model):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def linear_layers(model):
    return sum(type(layer) is nn.Linear for layer in model.modules())


@pytest.mark.parametrize("kind", [llama, qwen2])  # without biases, and with
def test_fused_projections_give_the_same_logits(kind):
    model = make(kind)
    expected, size = logits(model), parameter_bytes(model)
    fuse_projections(model)
    assert linear_layers(model) == 4 * SHAPE["num_hidden_layers"]
    assert parameter_bytes(model) == size
    assert mx.allclose(logits(model), expected, atol=1e-5)


def test_fused_projections_can_be_compiled():
    model = make(llama)
    expected = model(TOKENS)
    fuse_projections(model)
    assert mx.allclose(mx.compile(model)(TOKENS), expected, atol=1e-5)


def test_nothing_is_computed_by_fusing():
    mx.random.seed(7)
    model = llama.Model(llama.ModelArgs(model_type="llama", **SHAPE))
    mx.eval(mx.zeros(1))
    before = mx.get_active_memory()
    fuse_projections(model)
    assert (
        abs(mx.get_active_memory() - before) < 4096
    )  # no weights, only the angles of a position (platform/cpu_kernels.py)
    assert parameter_bytes(model) > 10 * 4096


def test_quantized_layers_stay():
    model = make(llama)
    nn.quantize(model, group_size=32, bits=4)
    expected = logits(model)
    fuse_projections(model)
    assert not linear_layers(model)
    assert mx.array_equal(logits(model), expected)


@pytest.mark.skipif(not native(), reason="there are no native kernels")
@pytest.mark.parametrize("kind", [llama, qwen2])
def test_quantized_layers_with_native_kernels_are_fused_and_parted_again(kind):
    model = make(kind)
    nn.quantize(model, group_size=32, bits=4)
    cpu_stored.replace_layers(model)
    expected, size = logits(model), parameter_bytes(model)
    fuse_projections(model)
    assert sum(type(layer) is cpu_stored.QuantizedLinear for layer in model.modules()) == 4 * SHAPE["num_hidden_layers"]
    assert parameter_bytes(model) == size
    assert mx.allclose(logits(model), expected, atol=1e-5)
    part_projections(model)
    assert mx.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.skipif(not native(), reason="there are no native kernels")
def test_quantized_layers_of_different_formats_stay():
    model = make(llama)
    nn.quantize(model, group_size=32, bits=8, class_predicate=lambda name, _: name.endswith("v_proj"))
    nn.quantize(model, group_size=32, bits=4)
    cpu_stored.replace_layers(model)
    expected = logits(model)
    fuse_projections(model)
    assert type(model.layers[0].self_attn.q_proj) is cpu_stored.QuantizedLinear
    assert mx.allclose(logits(model), expected, atol=1e-5)


class Halfway(nn.Module):
    """A model that computes values only without a cache, like layers that share keys."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(1, 1) for _ in range(3))

    def make_cache(self):
        return []

    def __call__(self, x, cache=None):
        x = x.astype(mx.float32)
        both = self.q_proj(x) + self.k_proj(x)
        return both if cache is not None else both + self.v_proj(x)


def test_a_model_that_does_not_use_all_of_them_keeps_its_layers():
    model = Halfway()
    layers = [model.q_proj, model.k_proj, model.v_proj]
    fuse_projections(model)
    assert [model.q_proj, model.k_proj, model.v_proj] == layers
