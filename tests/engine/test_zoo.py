"""One architecture of each kind of cache and head layout in the engine, beside mlx-lm alone. `make zoo` has all."""

from dataclasses import replace

import pytest

from mlxserver.engine.platform import cpu_layers, device
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.scheduler.execution import execution
from tools.zoo import models
from tools.zoo.comparison import problems

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="a CPU computes float32, which can be compared")

SLOTS = ["llama", "qwen3_moe", "gpt_neox", "openelm", "deepseek_v3", "nemotron-nas", "kimi_k25", "phi3"]
MERGED = [
    *("gemma3", "gpt_oss", "mimo_v2_flash", "deepseek_v32", "longcat_flash"),
    *("mamba2", "nemotron_h", "qwen3_5-vl", "lfm2", "recurrent_gemma"),
]
SINGLE = ["gemma2", "gemma2-2b-heads", "llama4", "gpt_bigcode", "afm7", "minimax_m3_vl"]
PADDED = replace(CPU, pad_slots=True, bucket_prefill=True, bucket_attention=True)  # a GPU's paths
KINDS = {**dict.fromkeys(SLOTS, "slots"), **dict.fromkeys(MERGED, "merged"), **dict.fromkeys(SINGLE, "single")}


def check(name, policy, cache):
    if policy.replace_kernels:
        cpu_layers.replace_functions()
    model = models.build(name)
    fitting = fitting_policy(model, policy, name)
    assert execution(model, fitting).cache == cache
    assert problems(model, fitting) == {}


@pytest.mark.parametrize(("name", "cache"), KINDS.items())
def test_the_engine_says_what_mlx_lm_says(name, cache):
    check(name, CPU, cache)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma2", "gemma3", "gpt_oss", "nemotron_h"])
def test_the_engine_says_what_mlx_lm_says_with_padded_slots_and_bucketed_chunks(name):
    check(name, PADDED, KINDS[name])
