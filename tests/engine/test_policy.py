"""Execution policies, and the branches of a GPU's policy run on this device by injection."""

import json
from dataclasses import fields, replace
from typing import get_args

from mlxserver.engine.mlx import mx

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.estimate import budget, estimate
from mlxserver.engine.platform import device
from mlxserver.engine.platform.attention_memory import AttentionMemory
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.policy import (
    CPU,
    CUDA,
    METAL,
    NATIVE,
    DeviceKind,
    ExecutionPolicy,
    WeightPolicy,
    current,
    policy_for,
)
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import CONFIGS, MORE_CONFIGS, random_model, write_random_model
from tests.support.batch_driver import SEEDED, Driver, prompt, sequence
from tests.support.prefixes import new_prefixes
from tools.harness.models import tiny_llama

POLICIES = pytest.mark.parametrize("policy", [CPU, METAL, CUDA], ids=["cpu", "metal", "cuda"])


def conversation(model, policy):
    """Tokens of sequences that join at different times, some of them with a cached prefix."""
    prefixes = new_prefixes(1 << 24, policy=policy)
    driver = Driver(Scheduler(model, max_running=4, prefixes=prefixes, policy=policy))
    driver.add(
        sequence(1, prompt(30, 1)), sequence(2, prompt(30, 2), SEEDED), sequence(3, prompt(300, 3), max_tokens=12)
    )
    driver.until_generated(2, 3)
    driver.add(sequence(4, prompt(5, 4)), sequence(5, prompt(300, 3) + (7, 8)))
    driver.finish()
    driver.add(sequence(6, prompt(300, 3) + (9,)))
    return driver.finish()


def test_every_kind_of_device_has_a_policy():
    assert {kind: policy_for(kind) for kind in get_args(DeviceKind)} == {"cpu": CPU, "metal": METAL, "cuda": CUDA}
    own = policy_for(device.describe().kind)
    assert current() == (NATIVE if own is CPU and native() else own)


def test_compiled_steps_need_padded_slots():
    with pytest.raises(ValueError, match="padded slots"):
        replace(CPU, compile_steps=True)


@POLICIES
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "nemotron_h"])
def test_a_batch_gives_the_same_tokens_under_every_policy(policy, name, without_compilation):
    model = random_model(name)
    assert conversation(model, policy) == conversation(model, CPU)


def test_compiled_steps_and_chunks_give_the_same_tokens(tmp_path):
    model = loader.load(ModelSpec("m", str(tiny_llama(tmp_path / "m", hidden=32, layers=1)))).model

    def tokens(policy):
        return Driver(Scheduler(model, max_running=1, policy=policy), sequence(1, prompt(20), max_tokens=6)).finish()

    assert tokens(CUDA) == tokens(CPU)


@POLICIES
def test_a_model_is_loaded_and_warmed_up_under_every_policy(tmp_path, policy, without_compilation):
    spec = ModelSpec("m", str(tiny_llama(tmp_path / "m", hidden=64, layers=2)), max_running=2, cache_tokens=1024)
    runner = Builder(stall_target=10.0, policy=policy).build(spec)
    assert Driver(runner.batch, sequence(1, prompt(9))).finish()[1]
    runner.batch.close()


@POLICIES
def test_projections_are_fused_as_the_policy_has_it(tmp_path, policy):
    path = tiny_llama(tmp_path / "m", hidden=64, layers=2)
    model = loader.load(ModelSpec("m", str(path)), policy=policy).model
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert linears == (4 if policy.fuse_projections else 7) * 2 + 1


@POLICIES
def test_weights_have_the_format_of_the_policy(tmp_path, policy):
    model, config = load_model(tiny_llama(tmp_path / "m", hidden=64, layers=2))
    model, config = quantize_model(model, config, 32, 4)
    save_model(tmp_path / "m", model)
    save_config(config, tmp_path / "m" / "config.json")
    loaded = loader.load(ModelSpec("m", str(tmp_path / "m")), policy=policy).model
    is_quantized = any(isinstance(module, nn.QuantizedLinear) for module in loaded.modules())
    assert is_quantized == (policy.weights is WeightPolicy.STORED)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_widened_weights_are_those_in_float32_rounded_once(tmp_path, kind, mode):
    path = write_random_model(tmp_path / "m", {"model_type": kind} | (CONFIGS | MORE_CONFIGS)[kind])
    model, config = load_model(path)
    model.set_dtype(mx.bfloat16)
    model, config = quantize_model(model, config, 32, 4, mode=mode)
    save_model(path, model)
    save_config(config, path / "config.json")
    spec = ModelSpec("m", str(path))
    stored, expected = estimate(spec, CUDA), loader.load(spec, policy=CPU).model
    wide = loader.load(replace(spec, weights="bfloat16"), policy=CUDA)
    assert estimate(replace(spec, weights="bfloat16"), CUDA).weights == wide.weight_bytes
    assert stored.widened == (wide.weight_bytes if kind == "llama" else 0)  # decode steps read few experts
    weights = dict(tree_flatten(wide.model.parameters()))
    for name, array in tree_flatten(expected.parameters()):
        if name in weights:  # others are fused
            assert mx.array_equal(weights[name], array.astype(mx.bfloat16)), name


def test_an_estimate_follows_the_policy(tmp_path):
    config = tiny_llama(tmp_path / "m", hidden=64, layers=2) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": "float16"}))
    on_cpu, on_gpu = (estimate(ModelSpec("m", str(tmp_path / "m")), policy) for policy in (CPU, CUDA))
    assert on_gpu.cache * 2 == on_cpu.cache
    stored = sum(file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors"))
    assert on_gpu.weights == stored != on_cpu.weights


def test_the_budget_is_the_policy_s_share_of_memory():
    half = replace(current(), memory_share=0.5)
    assert budget(0, half) == device.describe().memory_bytes // 2


def test_only_materialized_attention_shortens_chunks():
    assert AttentionMemory(32, CPU).fit(4096, 100_000) == 16
    assert AttentionMemory(32, CUDA).fit(4096, 100_000) == 4096
    assert AttentionMemory(32, CUDA).max_bytes(100_000) == 0


def test_every_field_of_a_policy_is_documented():
    for field in fields(ExecutionPolicy):
        assert f"{field.name}: " in str(ExecutionPolicy.__doc__)
