"""Decoder layers that compute a step in few operations give what their own code gives.

Without an NVIDIA GPU, these operations consist of MLX's (platform/cuda_layers.py); with one, they are its kernels.
"""

from dataclasses import replace

from mlxserver.engine.mlx import mx, nn

import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, mimo, qwen2, qwen3, qwen3_moe, rope_utils

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache.quantized import KVFormat
from mlxserver.engine.loading import fused_layers, loader
from mlxserver.engine.loading.fused_layers import fuse_layers, has_fused_layers
from mlxserver.engine.loading.fused_projections import fuse_projections, part_projections
from mlxserver.engine.loading.kv_format import quantize_kv
from mlxserver.engine.platform.policy import CUDA
from mlxserver.engine.platform.turned_linear import turn_linears
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import BASE, random_model
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.layer_steps import steps
from tools.harness.models import tiny_llama

PLAIN = replace(CUDA, compile_steps=False, fuse_layers=False)
FUSED = replace(PLAIN, fuse_layers=True)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHAPES = {
    "llama": (llama, {"num_hidden_layers": 2}),
    "llama, biased": (llama, {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": (llama, {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "llama 3": (llama, {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "llama, scaled": (llama, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": 64}),
    "llama, one key head": (llama, {"num_key_value_heads": 1, "hidden_size": 96, "head_dim": 24}),
    "qwen2": (qwen2, {"num_hidden_layers": 3}),
    "qwen3": (qwen3, {"head_dim": 32}),
    "mimo": (mimo, {"num_nextn_predict_layers": 0, "num_hidden_layers": 2}),
}


def made(kind, settings, dtype=mx.bfloat16, *, is_fused=True):
    """A model of random weights, with the layers of a loaded one."""
    mx.random.seed(3)
    own = BASE | settings | {"model_type": kind.__name__.rpartition(".")[2]}
    model = kind.Model(kind.ModelArgs.from_dict(own))
    for layer in model.modules():
        if isinstance(layer, nn.RMSNorm):
            layer.weight = 1 + 0.1 * mx.random.normal(layer.weight.shape)
    model.set_dtype(dtype)
    if is_fused:
        fuse_projections(model)
    fuse_layers(model)
    mx.eval(model.parameters())
    return model


@pytest.fixture(autouse=True)
def functions_of_mlx(monkeypatch):
    """Rotary embedding is MLX's own, as on CUDA, though a model was loaded for the CPU before."""
    monkeypatch.setattr(rope_utils, "mx", mx)


@pytest.fixture
def counts(monkeypatch):
    """How often a sum has been computed with its norm, and queries, keys and values of their product."""
    counted = {"add_norm": 0, "split_heads": 0}

    def counting(name, compute):
        def call(*arguments):
            counted[name] += 1
            return compute(*arguments)

        return call

    for name in counted:
        monkeypatch.setattr(fused_layers, name, counting(name, getattr(fused_layers, name)))
    return counted


def assert_logits_of_their_own_code(model, lengths, policy=FUSED):
    expected = steps(model, lengths, replace(policy, fuse_layers=False))
    assert all(map(mx.array_equal, steps(model, lengths, policy), expected))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", [[1], [70], [5, 300, 6, 700, 40]], ids=str)
def test_logits_are_those_of_the_layers_own_code(shape, dtype, lengths, counts):
    model = made(*shape, dtype)
    assert_logits_of_their_own_code(model, lengths)
    assert counts == {"add_norm": 10 * len(model.layers), "split_heads": 5 * len(model.layers)}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_compiled_step_has_the_logits_of_the_layers_own_code(dtype, counts):
    model = made(llama, {"num_hidden_layers": 1}, dtype)
    assert_logits_of_their_own_code(model, [5, 40], replace(FUSED, compile_steps=True))
    assert counts["add_norm"] == 2 * counts["split_heads"] > 0


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tokens_are_those_of_the_model_alone(name, without_compilation):
    kind, settings = SHAPES[name]
    model, alone = made(kind, settings, mx.float32), made(kind, settings, mx.float32, is_fused=False)
    sequences = [sequence(n, prompt(20 * n, n), max_tokens=8) for n in (1, 2, 3)]
    generated = Driver(Scheduler(model, max_running=4, policy=CUDA), *sequences).finish()
    for one in sequences:
        tokens = list(one.tokens)
        for _ in range(8):
            tokens.append(mx.argmax(alone(mx.array([tokens]))[0, -1]).item())
        assert generated[one.id] == tokens[-8:]


@pytest.mark.parametrize("kernel", [False, True])
def test_attention_may_be_its_own_kernel_or_not(kernel, counts):
    assert_logits_of_their_own_code(made(*SHAPES["llama"]), [5, 40], replace(FUSED, decode_kernel=kernel))
    assert counts["split_heads"]


def test_a_quantised_kv_cache_is_written_as_by_the_layers_own_code(counts):
    model = made(llama, {"num_attention_heads": 4, "head_dim": 64}, mx.float32)
    quantize_kv(model, KVFormat(8, 32))
    assert_logits_of_their_own_code(model, [5, 300, 40])
    assert counts["split_heads"]


def test_more_tokens_of_a_sequence_are_computed_by_the_layers_own_code(counts):
    model = made(*SHAPES["llama"])
    steps(model, [5, 40], FUSED, verified=fused_layers._MOST + 1)
    assert counts["split_heads"] == 4 * len(model.layers)


def test_projections_of_their_own_are_left_to_the_layers_own_code(counts):
    model = made(*SHAPES["llama"], is_fused=False)
    assert_logits_of_their_own_code(model, [5, 40])
    assert counts == {"add_norm": 10 * len(model.layers), "split_heads": 0}


def test_projections_can_be_parted_and_fused_again(counts):
    model = made(*SHAPES["llama"], mx.float32)
    part_projections(model)
    assert_logits_of_their_own_code(model, [5, 40])
    assert counts["split_heads"] == 0
    fuse_projections(model)
    assert_logits_of_their_own_code(model, [5, 40])
    assert counts["split_heads"] == 5 * len(model.layers)


def test_layers_of_experts_have_this_form(counts):
    model = made(qwen3_moe, EXPERTS | {"head_dim": 32}, mx.float32)
    assert_logits_of_their_own_code(model, [5, 40])
    assert counts == {"add_norm": 10 * len(model.layers), "split_heads": 5 * len(model.layers)}


class Doubled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, x, *given, **named):
        return 2 * self.layer(x, *given, **named)


class Halved(Doubled):
    def __call__(self, x, *given, **named):
        return self.layer(0.5 * x, *given, **named)


LEFT = {
    "half of a head is turned": ({}, lambda layer: setattr(layer.self_attn.rope, "dims", 8)),
    "pairs are neighbours": ({"rope_traditional": True}, None),
    "an adapter": ({}, lambda layer: setattr(layer.self_attn, "q_proj", Doubled(layer.self_attn.q_proj))),
}


@pytest.mark.parametrize(("fields", "change"), LEFT.values(), ids=LEFT)
def test_attention_of_another_form_is_left_to_its_own_code(fields, change, counts):
    model = made(llama, fields, mx.float32)
    for layer in model.layers if change else ():
        change(layer)
    assert_logits_of_their_own_code(model, [5, 40])
    assert counts["split_heads"] == 0


def test_a_norm_is_of_what_is_read_and_not_of_what_a_layer_returned():
    model = made(*SHAPES["qwen3"], mx.float32)
    model.layers[1], model.layers[2] = Halved(model.layers[1]), Doubled(model.layers[2])
    assert_logits_of_their_own_code(model, [5, 40])


def test_parameters_and_modules_have_the_names_that_they_had():
    model = random_model("llama")
    names = [name for name, _ in model.named_modules()], [name for name, _ in tree_flatten(model.parameters())]
    fuse_layers(model)
    fuse_layers(model)
    assert names == (
        [name for name, _ in model.named_modules()],
        [name for name, _ in tree_flatten(model.parameters())],
    )


@pytest.mark.parametrize(("policy", "is_fused"), [(PLAIN, False), (FUSED, True)])
def test_layers_are_those_of_the_policy(tmp_path, policy, is_fused):
    path = tiny_llama(tmp_path / "m", hidden=64, layers=2)
    assert has_fused_layers(loader.load(ModelSpec("m", str(path)), policy=policy).model) == is_fused


def test_a_linear_layer_that_is_given_another_matrix_has_its_products():
    """As an adapter, another form of the projections, or a format of the weights does it."""
    layer, x = nn.Linear(8, 4), mx.random.normal((3, 8))
    turn_linears(nn.Sequential(layer))
    step = mx.compile(lambda x: layer(x))
    assert mx.allclose(step(x), x @ layer.weight.T + layer.bias, atol=1e-6)
    layer.weight = mx.random.normal((4, 8))
    assert mx.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-6)
    assert set(layer.parameters()) == {"weight", "bias"}
