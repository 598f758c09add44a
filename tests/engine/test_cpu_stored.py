"""Weights stay as they are stored, quantized or of 16 bits; products are those of float32 weights, to rounding."""

import subprocess
import sys
from dataclasses import replace

from mlxserver.engine.mlx import mx, nn

import pytest
from mlx.utils import tree_flatten

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading import loader, sources
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.identity import model_identity
from mlxserver.engine.platform import cpu_layers, cpu_stored, policy
from mlxserver.engine.platform.native import build
from mlxserver.engine.platform.native.extension import is_right, native
from mlxserver.engine.platform.policy import CPU, NATIVE, WeightPolicy
from tools.harness.models import tiny_llama
from tools.harness.tiny_gguf import write_tiny_gguf

needs_kernels = pytest.mark.skipif(native() is None, reason="the native kernels are not built")


def quantized(outputs, inputs, group, bits, dtype=mx.float16):
    words, scales, biases = mx.quantize(mx.random.normal((outputs, inputs)), group_size=group, bits=bits)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    wide = (words, scales.astype(mx.float32), biases.astype(mx.float32))
    return (words, scales, biases), mx.dequantize(*wide, group_size=group, bits=bits)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_products_of_every_instruction_set_are_exact_to_rounding(bits, group, dtype):
    for outputs, inputs in ((37, group), (131, 1152), (1, 384)):
        parts, weight = quantized(outputs, inputs, group, bits, dtype)
        for rows in (1, 2, 3, 4, 5, 7, 16, 33, 128):
            x = mx.random.normal((rows, inputs))
            exact = x @ weight.T
            for level in native().levels():
                product = native().product(x, *parts, group, bits, level)
                assert mx.allclose(product, exact, rtol=1e-5, atol=2e-4), (rows, inputs, level)


@needs_kernels
def test_rows_beyond_a_block_are_exact_to_rounding():
    parts, weight = quantized(70, 320, 32, 4)
    x = mx.random.normal((401, 320))
    assert mx.allclose(native().product(x, *parts, 32, 4), x @ weight.T, rtol=1e-5, atol=2e-4)


@needs_kernels
def test_inputs_may_have_any_strides_and_leading_dimensions():
    parts, weight = quantized(9, 64, 32, 4)
    x = mx.random.normal((3, 64, 2, 5)).transpose(3, 0, 2, 1)
    assert mx.allclose(native().product(x, *parts, 32, 4), x @ weight.T, rtol=1e-5, atol=2e-5)


@needs_kernels
def test_shapes_that_do_not_fit_are_refused():
    parts, _ = quantized(9, 64, 32, 4)
    with pytest.raises(ValueError, match="do not fit"):
        native().product(mx.zeros((1, 96)), *parts, 32, 4)


@needs_kernels
def test_an_instruction_set_that_the_cpu_has_not_is_refused():
    parts, _ = quantized(9, 64, 32, 4)
    with pytest.raises(ValueError, match="no instruction set martian"):
        native().product(mx.zeros((1, 64)), *parts, 32, 4, "martian")


@needs_kernels
def test_replaced_layers_compute_as_the_dequantized_ones():
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 32))
    nn.quantize(model, group_size=32, bits=4)
    tokens = mx.array([[1, 2, 3]])
    expected = model(tokens)
    cpu_stored.replace_layers(model)
    assert [type(layer) for layer in model.layers] == [cpu_stored.QuantizedEmbedding, cpu_stored.QuantizedLinear]
    assert mx.allclose(model(tokens), expected, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_weights_stay_as_stored_by_default():
    assert policy.current() == NATIVE


def write_quantized(path, bits, dtype=mx.bfloat16, group_size=32, **options):
    """A tiny llama whose layers are quantized, and whose other floats have 16 bits; the path."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(tiny_llama(path, hidden=256, layers=2))
    model.set_dtype(dtype)
    model, config = quantize_model(model, config | {"torch_dtype": "bfloat16"}, group_size, bits, **options)
    save_model(path, model)
    save_config(config, path / "config.json")
    return path


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64)])
def test_the_memory_of_quantized_weights_is_estimated_within_15_percent(tmp_path, bits, group_size):
    spec = ModelSpec("m", str(write_quantized(tmp_path / "m", bits, group_size=group_size)))
    loaded, dequantized = loader.load(spec, policy=NATIVE), loader.load(spec, policy=CPU)
    assert loaded.weight_bytes < 0.4 * dequantized.weight_bytes
    assert abs(estimate(spec, NATIVE).weights - loaded.weight_bytes) <= 0.15 * loaded.weight_bytes


@pytest.mark.parametrize(("bits", "mode"), [(6, "affine"), (4, "mxfp4")])
def test_formats_without_a_kernel_are_dequantized(tmp_path, bits, mode):
    spec = ModelSpec("m", str(write_quantized(tmp_path / "m", bits, mode=mode)))
    loaded, expected = loader.load(spec, policy=NATIVE), loader.load(spec, policy=CPU)
    assert estimate(spec, NATIVE).weights == estimate(spec, CPU).weights
    arrays = dict(tree_flatten(expected.model.parameters()))
    for name, array in tree_flatten(loaded.model.parameters()):
        assert mx.array_equal(array, arrays[name]), name


def test_ranks_that_share_a_model_dequantize_it(tmp_path):
    spec = ModelSpec("m", str(write_quantized(tmp_path / "m", 4)), shard="tensor")
    assert NATIVE.with_weights("auto", is_shared=True) == replace(NATIVE, weights=WeightPolicy.FLOAT32)
    assert estimate(spec, NATIVE) == estimate(spec, CPU)


def test_prefixes_of_both_forms_are_not_shared(tmp_path):
    spec = ModelSpec("m", str(write_quantized(tmp_path / "m", 4)))
    forms = [model_identity(spec, loader.load(spec, policy=policy)) for policy in (NATIVE, CPU)]
    assert forms[0] != forms[1]


# -- 16 bits ----------------------------------------------------------------------------------------------------------


def write_half(path, dtype):
    """A tiny llama whose floats have 16 bits; the path."""
    from mlx_lm.utils import load_model, save_config, save_model

    model, config = load_model(tiny_llama(path, hidden=256, layers=2))
    model.set_dtype(dtype)
    save_model(path, model)
    save_config(config | {"torch_dtype": str(dtype).removeprefix("mlx.core.")}, path / "config.json")
    return path


@needs_kernels
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_layers_with_weights_of_16_bits_compute_as_with_float32(dtype):
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.RMSNorm(96), nn.Linear(96, 50, bias=False))
    model.set_dtype(dtype)
    wide = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.RMSNorm(96), nn.Linear(96, 50, bias=False))
    wide.update(model.parameters())
    wide.set_dtype(mx.float32)
    cpu_stored.replace_layers(model)
    types = [array.dtype for _, array in tree_flatten(model.parameters())]
    assert (types.count(dtype), types.count(mx.float32)) == (3, 2)
    for shape in ((1, 1), (1, 3), (2, 20), (0, 1)):
        tokens = mx.random.randint(0, 50, shape)
        assert model(tokens).dtype == mx.float32
        assert mx.allclose(model(tokens), wide(tokens), rtol=1e-5, atol=1e-5)
    x = mx.random.normal((2, 3, 64))
    assert mx.allclose(model.layers[0].as_linear(x), wide.layers[0].as_linear(x), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_weights_that_model_code_computes_with_become_float32():
    layer = nn.Linear(64, 32, bias=False)
    layer.set_dtype(mx.bfloat16)
    cpu_stored.replace_layers(layer)
    x = mx.random.normal((2, 64))
    expected = layer(x)
    for _ in range(2):
        assert mx.allclose(x @ layer.weight.T, expected, rtol=1e-5, atol=1e-5)
    assert layer["weight"].dtype == mx.float32
    assert type(layer) is cpu_layers.Linear


@needs_kernels
def test_weights_whose_type_alone_is_asked_for_stay_as_they_are():
    layer = nn.Linear(64, 32)
    layer.set_dtype(mx.bfloat16)
    cpu_stored.replace_layers(layer)
    for _ in range(3):
        assert (layer.weight.dtype, layer.weight.shape) == (mx.float32, (32, 64))
        mx.eval(layer(mx.ones((1, 64))), layer.parameters())
    assert layer["weight"].dtype == mx.bfloat16


@needs_kernels
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_model_of_16_bits_takes_half_of_the_memory_and_answers_as_in_float32(tmp_path, dtype):
    spec = ModelSpec("m", str(write_half(tmp_path / "m", dtype)))
    kept, wide = loader.load(spec, policy=NATIVE), loader.load(spec, policy=CPU)
    assert kept.weight_bytes < 0.51 * wide.weight_bytes
    assert kept.weight_bytes <= estimate(spec, NATIVE).weights < 1.01 * kept.weight_bytes
    prompt = list(range(5, 25))
    answer, logits = greedy(kept.model, prompt, 12)
    expected, exact = greedy(wide.model, prompt, 12)
    assert answer == expected
    assert all(mx.allclose(row, own, rtol=1e-4, atol=1e-4) for row, own in zip(logits, exact, strict=True))


@needs_kernels
def test_fused_projections_of_16_bits_stay_so(tmp_path):
    spec = ModelSpec("m", str(write_half(tmp_path / "m", mx.bfloat16)))
    tokens, parted = mx.array([[5, 6, 7]]), loader.load(spec, policy=NATIVE)
    fused = loader.load(spec, policy=replace(NATIVE, fuse_projections=True))
    assert fused.weight_bytes == parted.weight_bytes
    assert mx.allclose(fused.model(tokens), parted.model(tokens), rtol=1e-4, atol=1e-4)


# -- GGUF files -------------------------------------------------------------------------------------------------------


def test_blocks_of_a_gguf_file_are_kept_without_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SERVER_CACHE", str(tmp_path / "cache"))
    types = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "F16", "Q5_0")
    spec = ModelSpec("m", str(write_tiny_gguf(tmp_path / "tiny.gguf", hidden=256, types=types)))
    before = estimate(spec, NATIVE)
    loaded, expected = loader.load(spec, policy=NATIVE), loader.load(spec, policy=CPU)
    assert estimate(spec, NATIVE).weights == pytest.approx(loaded.weight_bytes, rel=0.05)
    assert before.weights == loaded.weight_bytes
    arrays, kept = dict(tree_flatten(loaded.model.parameters())), 0
    for name, array in tree_flatten(expected.model.parameters()):
        parts = [arrays[name], *(arrays.get(name.replace("weight", part)) for part in ("scales", "biases"))]
        if parts[1] is None:
            assert mx.array_equal(parts[0], array), name
            continue
        bits, kept = 32 * parts[0].shape[1] // array.shape[1], kept + 1
        wide = mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), group_size=32, bits=bits)
        assert mx.allclose(wide, array, rtol=1e-6, atol=1e-7), name
    assert kept == 11  # of fifteen matrices; two in F16 stay so, two in Q5_0 are float32


@needs_kernels
@pytest.mark.parametrize(("types", "halves"), [(("F16",), 15), (("BF16",), 15), (("F16", "Q8_0", "BF16"), 10)])
def test_matrices_of_a_gguf_file_in_16_bits_stay_so_without_loss(tmp_path, monkeypatch, types, halves):
    monkeypatch.setenv("MLX_SERVER_CACHE", str(tmp_path / "cache"))
    spec = ModelSpec("m", str(write_tiny_gguf(tmp_path / "tiny.gguf", types=types)))
    before = estimate(spec, NATIVE)
    loaded, expected = loader.load(spec, policy=NATIVE), loader.load(spec, policy=CPU)
    assert before.weights == loaded.weight_bytes <= estimate(spec, NATIVE).weights < 1.05 * loaded.weight_bytes
    arrays = dict(tree_flatten(loaded.model.parameters()))
    kept = [name for name, array in arrays.items() if array.dtype in (mx.float16, mx.bfloat16)]
    wide = {name: array for name, array in tree_flatten(expected.model.parameters()) if name in kept}
    assert all(mx.array_equal(arrays[name].astype(mx.float32), array) for name, array in wide.items())
    assert len([name for name in kept if name.endswith("weight")]) == len(wide) == halves


def test_a_gguf_file_without_such_blocks_is_converted_to_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SERVER_CACHE", str(tmp_path / "cache"))
    spec = ModelSpec("m", str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    loaded = loader.load(spec, policy=NATIVE)
    assert {array.dtype for _, array in tree_flatten(loaded.model.parameters())} == {mx.float32}
    assert estimate(spec, NATIVE).weights == loaded.weight_bytes


def greedy(model, prompt, count):
    """The tokens of a greedy answer, and the logits of each."""
    cache, tokens, logits = caches.new_cache(model), mx.array([prompt]), []
    answer = []
    for _ in range(count):
        logits.append(model(tokens, cache=cache)[0, -1])
        tokens = mx.argmax(logits[-1])[None, None]
        answer.append(int(tokens.item()))
    return answer, logits


@needs_kernels
def test_answers_of_the_embedded_model_are_those_of_dequantized_weights():
    """A near tie, of logits that differ by less than rounding does, may be decided either way: what follows differs."""
    path = sources.resolve("embedded:smollm2", weights=WeightPolicy.QUANTIZED)
    spec = ModelSpec("m", str(path))
    kept, dequantized = (loader.load(spec, policy=own) for own in (NATIVE, CPU))
    assert kept.weight_bytes < 0.2 * dequantized.weight_bytes
    for question in ("The capital of France is", "Once upon a time, in a small village by the sea,"):
        prompt = kept.tokenizer.encode(question)
        answer, logits = greedy(kept.model, prompt, 16)
        expected, exact = greedy(dequantized.model, prompt, 16)
        for own, other, row, exact_row in zip(answer, expected, logits, exact, strict=True):
            assert mx.allclose(row, exact_row, atol=2e-3)
            if own != other:
                assert abs(row[own] - row[other]).item() < 2e-3
                break


# -- without the kernels ----------------------------------------------------------------------------------------------

WITHOUT = """
import sys
from mlxserver.engine.platform.native import build
build.module_name = lambda: "mlxserver_native_missing"
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.policy import CPU, current
assert native() is None and (current() is CPU or not build.is_wanted())
print(build.missing())
"""


@pytest.mark.skipif(not build.is_wanted(), reason="kernels are for a Linux CPU")
def test_without_the_kernels_weights_are_dequantized_and_the_doctor_has_the_line_to_type():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("-m mlxserver.engine.platform.native.build")


@pytest.mark.skipif(not build.is_wanted(), reason="kernels are for a Linux CPU")
def test_without_a_compiler_the_set_up_is_silent_and_builds_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "module_name", lambda: "mlxserver_native_missing")
    assert build.main() == 0
    assert capsys.readouterr() == ("", "")
    assert "install g++" in build.missing()


def test_other_devices_build_nothing(monkeypatch, capsys):
    monkeypatch.setattr(build, "is_wanted", lambda: False)
    assert build.main() == 0
    assert build.missing() is None
    assert capsys.readouterr() == ("", "")


def test_kernels_that_compute_wrongly_are_not_used():
    class Wrong:
        @staticmethod
        def product(x, *parts):
            return mx.zeros((x.shape[0], 34))

    assert not is_right(Wrong)


def test_the_module_is_named_after_its_sources(tmp_path, monkeypatch):
    name = build.module_name.__wrapped__
    for file in build._SOURCES.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    assert name() == build.module_name()
    (tmp_path / "dense.cpp").write_text("// another one")
    assert name() != build.module_name()
