"""Quantised checkpoints on a CPU: the loaded weights are those that mlx-lm's kernels compute with."""

import json
from pathlib import Path

from mlxserver.engine.mlx import mx

import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import load_model, quantize_model, save_model

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading.loader import load
from mlxserver.engine.platform import device
from mlxserver.engine.platform.cpu_stored import HalfEmbedding, HalfLinear, is_replaced
from tests.support.architectures import BASE, CONFIGS, MORE_CONFIGS, random_model
from tools.harness.models import tiny_llama

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="a GPU keeps the weights as they are")
TOKENS = mx.array([[5, 6, 7, 8]])


def checkpoint(directory, name="llama", dtype=mx.float32, **options):
    """A directory of a random model, quantised as mlx_lm.convert does, with the tokenizer of a tiny llama."""
    tiny_llama(directory)
    model = random_model(name)
    model.set_dtype(dtype)
    model, config = quantize_model(model, BASE | {"model_type": name} | (CONFIGS | MORE_CONFIGS)[name], **options)
    for file in directory.glob("model*"):
        file.unlink()
    save_model(directory, model, donate_model=False)
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def expected(source):
    """Logits of mlx-lm's own quantised layers, with scales of full precision."""
    model, _ = load_model(Path(source))
    model.set_dtype(mx.float32)
    return model(TOKENS)


def check(source):
    """Dequantised, and as the device has them: all floats but those of layers with native kernels are float32."""
    for weights in ("float32", "auto"):
        model = load(ModelSpec("m", source, weights=weights)).model
        layers = [name for name, layer in model.named_modules() if is_replaced(layer)]
        assert not (layers and weights == "float32")
        layers += [name for name, layer in model.named_modules() if isinstance(layer, HalfLinear | HalfEmbedding)]
        kept = {f"{name}.{part}" for name in layers for part in ("weight", "scales", "biases")}
        arrays = [array for name, array in tree_flatten(model.parameters()) if name not in kept]
        assert {array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating)} == {mx.float32}
        assert mx.allclose(model(TOKENS), expected(source), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_weights_are_exact(tmp_path, bits, dtype):
    check(checkpoint(tmp_path / "m", dtype=dtype, group_size=32, bits=bits))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_microscaled_weights_are_exact(tmp_path, name, mode, group_size, bits):
    check(checkpoint(tmp_path / "m", name, mx.bfloat16, mode=mode, group_size=group_size, bits=bits))


def test_each_layer_may_have_its_own_format(tmp_path):
    def form(path, layer):
        if "lm_head" in path:
            return False
        return {"group_size": 64, "bits": 8} if "mlp" in path else {"group_size": 32, "bits": 3}

    check(checkpoint(tmp_path / "m", dtype=mx.bfloat16, group_size=64, bits=4, quant_predicate=form))


def test_a_scale_per_expert_is_heeded(tmp_path):
    """mlx-lm's dequantize_model() leaves out nvfp4's global scales: weights would be thousands of times too large."""
    source = checkpoint(tmp_path / "m", "qwen3_moe", mode="nvfp4", group_size=16, bits=4, global_scale=True)
    stored, _ = load_model(tmp_path / "m")
    scaled = {name: layer for name, layer in stored.named_modules() if isinstance(layer, QuantizedSwitchLinear)}
    assert scaled
    loaded = dict(load(ModelSpec("m", source)).model.named_modules())
    for name, layer in scaled.items():
        for n, scale in enumerate(layer.global_scale):
            own = mx.dequantize(layer.weight[n], layer.scales[n], None, 16, 4, "nvfp4", global_scale=scale)
            assert mx.allclose(loaded[name].weight[n], own.astype(mx.float32), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_awq_and_gptq_weights_are_as_mlx_lm_converts_them(tmp_path, method):
    directory = tiny_llama(tmp_path / "m", hidden=64)
    weights = mx.load(str(directory / "model.safetensors"))
    for name in [name for name in weights if "_proj" in name]:
        outputs, inputs = weights.pop(name).shape
        prefix = name.removesuffix(".weight")
        packed = mx.random.randint(0, 1 << 30, (inputs, outputs // 8), key=mx.random.key(len(name)))
        zeros = mx.random.randint(0, 1 << 30, (inputs // 32, outputs // 8), key=mx.random.key(2))
        weights |= {f"{prefix}.qweight": packed.astype(mx.int32), f"{prefix}.qzeros": zeros.astype(mx.int32)}
        weights[f"{prefix}.scales"] = mx.full((inputs // 32, outputs), 0.01, dtype=mx.float16)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    quantization = {"quant_method": method, "bits": 4, "group_size": 32, "version": "gemm"}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    check(str(directory))
