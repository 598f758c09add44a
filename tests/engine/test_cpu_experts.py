"""Weights of experts stay as they are stored on a Linux CPU; products are MLX's of float32 weights, to rounding."""

from mlxserver.engine.mlx import mx, nn

import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.platform import cpu_layers, cpu_stored
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.policy import CPU, NATIVE
from tests.support.architectures import BASE, CONFIGS, write_random_model
from tools.zoo import models

pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels are not built")
EXPERTS, OUTPUTS, INPUTS = 5, 37, 96
HALVES = (mx.float16, mx.bfloat16)


def choices():
    """Inputs with an index for each row, and whether they lie in order, as model code has them."""
    random = mx.random.normal
    yield random((2, 3, 1, 1, INPUTS)), mx.random.randint(0, EXPERTS, (2, 3, 2)), False  # the rows of a token
    yield random((2, 3, 2, 1, INPUTS)), mx.random.randint(0, EXPERTS, (2, 3, 2)), False
    yield random((1, 1, 1, 1, INPUTS)), mx.array([[[4, 0, 1]]], mx.uint32), False
    yield random((70, 1, INPUTS)), mx.sort(mx.random.randint(0, EXPERTS, (70,))), True
    yield random((70, 1, INPUTS)), mx.random.randint(0, EXPERTS, (70,)), True  # who says so may be wrong
    yield random((4, 3, INPUTS)), mx.array([2, 2, 0, 3]), False  # several rows of an index
    yield random((3, INPUTS, 1)).swapaxes(1, 2), mx.array([0, 4, 0]), False


def reference(x, weight, indices):
    return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices)


@pytest.mark.parametrize("dtype", [mx.float32, *HALVES])
def test_products_of_16_bits_are_exact_to_rounding(dtype):
    weight = mx.random.normal((EXPERTS, OUTPUTS, INPUTS)).astype(dtype)
    for x, indices, is_sorted in choices():
        exact = reference(x, weight.astype(mx.float32), indices)
        for level in native().levels():
            product = native().expert_dense(x, weight, indices, is_sorted, level)
            assert (product.shape, product.dtype) == (exact.shape, mx.float32)
            assert mx.allclose(product, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float32, *HALVES])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, 96 // 3)])
def test_products_of_quantized_weights_are_exact_to_rounding(bits, group, dtype):
    words, *parts = mx.quantize(mx.random.normal((EXPERTS, OUTPUTS, INPUTS)), group_size=group, bits=bits)
    scales, biases = (part.astype(dtype) for part in parts)
    wide = mx.dequantize(words, *(part.astype(mx.float32) for part in (scales, biases)), group_size=group, bits=bits)
    for x, indices, is_sorted in choices():
        exact = reference(x, wide, indices)
        for level in native().levels():
            product = native().expert_product(x, words, scales, biases, indices, group, bits, is_sorted, level)
            assert mx.allclose(product, exact, rtol=1e-5, atol=1e-4)


def test_no_rows_have_no_products():
    product = native().expert_dense(mx.zeros((0, 1, 64)), mx.zeros((2, 8, 64)), mx.zeros(0, mx.uint32))
    assert product.shape == (0, 1, 8)


@pytest.mark.parametrize(("x", "weight"), [((1, 1, 32), (2, 8, 64)), ((1, 1, 64), (8, 64)), ((64,), (2, 8, 64))])
def test_shapes_that_do_not_fit_are_refused(x, weight):
    with pytest.raises(ValueError, match="do not fit"):
        native().expert_dense(mx.zeros(x), mx.zeros(weight), mx.zeros(1, mx.uint32))


@pytest.mark.parametrize("form", ["bfloat16", "4-bit"])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_layers_compute_what_mlx_lms_do_with_float32_weights(form, tokens):
    layer = SwitchGLU(64, 96, num_experts=4, bias=True)
    for part in (layer.gate_proj, layer.up_proj, layer.down_proj):
        part.bias = mx.random.normal(part.bias.shape)
    layer.set_dtype(mx.bfloat16)
    if form == "4-bit":
        nn.quantize(layer, group_size=32, bits=4)
    x, chosen = mx.random.normal((1, tokens, 64)), mx.random.randint(0, 4, (1, tokens, 2))
    wide = SwitchGLU(64, 96, num_experts=4, bias=True)
    wide.update(layer.parameters()) if form != "4-bit" else None
    cpu_stored.replace_layers(layer)
    if form == "4-bit":
        for own, other in zip(
            (layer.gate_proj, layer.up_proj, layer.down_proj),
            (wide.gate_proj, wide.up_proj, wide.down_proj),
            strict=True,
        ):
            parts = (own.weight, own.scales.astype(mx.float32), own.biases.astype(mx.float32))
            other.weight, other.bias = mx.dequantize(*parts, group_size=32, bits=4), own.bias
    wide.set_dtype(mx.float32)
    types = {array.dtype for name, array in tree_flatten(layer.parameters()) if name.endswith("weight")}
    assert types == {mx.uint32 if form == "4-bit" else mx.bfloat16}
    assert layer(x, chosen).dtype == mx.float32
    assert mx.allclose(layer(x, chosen), wide(x, chosen), rtol=1e-4, atol=1e-3)


def test_a_number_of_experts_is_known_without_their_weights_in_float32():
    layer = SwitchLinear(32, 8, 3, bias=False)
    layer.set_dtype(mx.float16)
    cpu_stored.replace_layers(layer)
    assert (layer.input_dims, layer.output_dims, layer.num_experts) == (32, 8, 3)
    assert layer["weight"].dtype == mx.float16


def write(path, name, *, bits=None):
    """A tiny model with experts in bfloat16, quantized if bits are given; the path."""
    write_random_model(path, BASE | CONFIGS[name] if name in CONFIGS else BASE | models.config(name))
    model, config = load_model(path)
    model.set_dtype(mx.bfloat16)
    config |= {"torch_dtype": "bfloat16"}
    if bits:
        model, config = quantize_model(model, config, 32, bits)
    save_model(path, model)
    save_config(config, path / "config.json")
    return ModelSpec("m", str(path))


@pytest.mark.parametrize(("name", "bits"), [("qwen3_moe", None), ("qwen3_moe", 4), ("gpt_oss", None), ("mixtral", 8)])
def test_a_model_with_experts_takes_what_is_stored_and_computes_as_in_float32(tmp_path, name, bits):
    spec = write(tmp_path / "m", name, bits=bits)
    kept, wide = loader.load(spec, policy=NATIVE), loader.load(spec, policy=CPU)
    assert kept.weight_bytes < (0.52 if bits is None else 0.45) * wide.weight_bytes
    assert kept.weight_bytes <= estimate(spec, NATIVE).weights < 1.1 * kept.weight_bytes
    for tokens in (mx.array([[5]]), mx.arange(40)[None]):
        assert mx.allclose(kept.model(tokens), wide.model(tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama4_text", "seed_oss"])
def test_tied_heads_that_read_their_weight_stay_as_they_are_stored(tmp_path, name):
    config = BASE | models.config(name) | {"tie_word_embeddings": True}
    path = write_random_model(tmp_path / "m", config)
    model, config = load_model(path)
    model.set_dtype(mx.bfloat16)
    save_model(path, model)
    save_config(config | {"torch_dtype": "bfloat16"}, path / "config.json")
    spec = ModelSpec("m", str(path))
    kept, wide = loader.load(spec, policy=NATIVE), loader.load(spec, policy=CPU)
    tokens = mx.arange(7)[None]
    for _ in range(3):
        assert mx.allclose(kept.model(tokens), wide.model(tokens), rtol=1e-3, atol=1e-3)
    assert kept.model.model.embed_tokens["weight"].dtype == mx.bfloat16
    held = sum(array.nbytes for _, array in tree_flatten(kept.model.parameters()))
    assert held == kept.weight_bytes <= estimate(spec, NATIVE).weights


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_in_float32_have_a_product_per_expert_too(tokens):
    layer = SwitchGLU(64, 96, num_experts=4)
    x, chosen = mx.random.normal((1, tokens, 64)), mx.random.randint(0, 4, (1, tokens, 2))
    expected = layer(x, chosen)
    cpu_layers.replace_layers(layer)
    assert type(layer.up_proj) is cpu_layers.SwitchLinear
    assert mx.allclose(layer(x, chosen), expected, rtol=1e-4, atol=1e-4)
