"""Estimates made before a load, compared with the memory of the load."""

import gc
import json

from mlxserver.engine.mlx import mx

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.caches import bytes_per_token
from mlxserver.engine.loading import estimate as estimate_module
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.architecture import Architecture, inspect_architecture
from mlxserver.engine.loading.estimate import DEFAULT_CACHE_TOKENS, Limits, budget, estimate
from mlxserver.engine.loading.sources import checkpoint_metadata
from mlxserver.engine.platform import cpu_layers, device
from mlxserver.engine.platform.attention_memory import LARGEST_CHUNK, STATE_REACH, AttentionMemory
from mlxserver.engine.platform.policy import CPU, current
from mlxserver.engine.runners import builder
from mlxserver.engine.sequence import Sequence
from tests.support.local_models import in_hub
from tools.harness.models import tiny_llama
from tools.harness.tiny_gguf import CONTEXT, write_tiny_gguf
from tools.zoo import models

SHAPES = [(64, 2), (256, 8), (512, 3)]


def measured_load(spec):
    """The model, and the growth of live arrays by its load in bytes."""
    gc.collect()
    before = device.active_bytes()
    loaded = loader.load(spec)
    return loaded, device.active_bytes() - before


@pytest.mark.skipif(not device.is_cpu(), reason="the figures are those of float32")
@pytest.mark.parametrize(("hidden", "layers"), SHAPES)
def test_the_weights_are_estimated_within_15_percent(tmp_path, hidden, layers):
    spec = ModelSpec("m", str(tiny_llama(tmp_path / "m", hidden=hidden, layers=layers)))
    expected = estimate(spec)
    loaded, taken = measured_load(spec)
    assert expected.weights == loaded.weight_bytes
    assert abs(expected.weights - taken) <= 0.15 * taken
    assert expected.cache == loaded.limits.reserved * bytes_per_token(loaded.model)


@pytest.mark.skipif(not device.is_cpu(), reason="the figures are those of float32")
def test_the_embedded_model_is_estimated_within_15_percent():
    spec = ModelSpec("m", "embedded:smollm2")
    expected = estimate(spec)
    loaded, taken = measured_load(spec)
    assert abs(expected.weights - taken) <= 0.15 * taken
    assert expected.cache == loaded.limits.reserved * bytes_per_token(loaded.model)


def test_a_gguf_file_is_estimated_from_its_header_before_it_is_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SERVER_CACHE", str(tmp_path / "cache"))
    spec = ModelSpec("m", str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    before = estimate(spec)
    assert not (tmp_path / "cache").exists()
    loaded = loader.load(spec)
    assert estimate(spec) == before
    assert loaded.context_length == CONTEXT
    if device.is_cpu():
        assert before.weights == loaded.weight_bytes


@pytest.mark.parametrize(
    ("fields", "own", "limits"),
    [
        ({}, 2048, Limits(2048, 2048, 1, None)),
        ({}, 131_072, Limits(131_072, 4096, 1, None)),
        ({"min_context": 512}, 131_072, Limits(131_072, 512, 1, None)),
        ({"context_length": 512}, 2048, Limits(512, 512, 1, None)),
        ({"cache_tokens": 1000}, 2048, Limits(1000, 1000, 1, 1000)),
    ],
)
def test_the_context_is_the_model_s_own_and_one_short_request_is_reserved(fields, own, limits):
    assert estimate_module.limits(ModelSpec("m", "x", **fields), own) == limits


@pytest.mark.parametrize(
    ("fields", "own", "context", "cache_tokens"),
    [
        ({}, 2048, 2048, DEFAULT_CACHE_TOKENS),
        ({"max_running": 4}, 2048, 2048, 8192),
        ({}, 131_072, DEFAULT_CACHE_TOKENS, DEFAULT_CACHE_TOKENS),
        ({"context_length": 131_072}, 131_072, 131_072, 131_072),
        ({"context_length": 512, "max_running": 2}, 2048, 512, 1024),
        ({"cache_tokens": 1000}, 2048, 1000, 1000),
    ],
)
def test_the_cache_of_a_shared_model_is_reserved_whole(fields, own, context, cache_tokens):
    spec = ModelSpec("m", "x", shard="tensor", **fields)
    expected = Limits(context, cache_tokens, spec.max_running, cache_tokens)
    assert estimate_module.limits(spec, own) == expected


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "its config.json can't be used: KeyError"),
        ({"model_type": "martian"}, "Model type martian not supported"),
        ({"model_type": "llama"}, "its config.json can't be used: TypeError"),
        ([], "has no object in it"),
    ],
)
def test_a_model_with_a_wrong_config_is_refused_before_anything_is_read(tmp_path, config, complaint):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadFailed, match=complaint):
        estimate(ModelSpec("m", str(tmp_path)))


def test_layers_with_a_window_keep_no_more_than_that():
    anatomy = Architecture(weights=0, layers=((10, 0), (10, 100)), sequence_values=7, width=0, vocab=0)
    assert anatomy.cache_values(tokens=1000, sequences=2) == 10 * 1000 + 10 * 200 + 2 * 7


def test_the_budget_is_the_limit_or_a_share_of_the_device():
    assert budget(123) == 123
    assert 0 < budget(0) < device.describe().memory_bytes


REACH = st.sampled_from([0, STATE_REACH])


@given(heads=st.integers(1, 128), wanted=st.integers(16, 4096), done=st.integers(0, 200_000), reach=REACH)
def test_a_chunk_is_as_long_as_its_scores_allow(heads, wanted, done, reach):
    memory = AttentionMemory(heads, CPU, reach)
    chunk = memory.fit(wanted, done)
    assert 16 <= chunk <= wanted
    assert chunk == 16 or memory.chunk_bytes(chunk, done + chunk) <= 128 << 20
    assert chunk == wanted or memory.chunk_bytes(chunk + 1, done + chunk + 1) > 128 << 20


@given(heads=st.integers(1, 128), wanted=st.integers(16, 4096), reach=REACH, data=st.data())
def test_no_chunk_takes_more_than_was_counted(heads, wanted, reach, data):
    context = data.draw(st.integers(1, 200_000))
    done = data.draw(st.integers(0, context - 1))
    memory = AttentionMemory(heads, CPU, reach)
    chunk = min(memory.fit(wanted, done), context - done)
    assert chunk <= memory.fit(LARGEST_CHUNK, 0)
    assert memory.chunk_bytes(chunk, done + chunk) <= memory.max_bytes(context)


@pytest.mark.skipif(not device.is_cpu(), reason="only a CPU writes the scores out")
def test_a_prompt_as_long_as_the_context_takes_no_more_than_was_estimated(tmp_path):
    spec = ModelSpec("m", str(tiny_llama(tmp_path / "m", hidden=256, layers=4)), cache_tokens=1024, max_running=2)
    expected = estimate(spec)
    gc.collect()
    before = device.active_bytes()
    batch = builder.Builder(stall_target=10.0).build(spec).batch
    mx.reset_peak_memory()
    batch.insert([Sequence(1, tuple(n % 300 for n in range(1000)), SamplingParams(temperature=0.0), 4)])
    while not batch.decode():
        batch.prefill()
    taken = mx.get_peak_memory() - before
    batch.close()
    assert expected.weights < taken <= expected.total


@pytest.mark.skipif(not device.is_cpu(), reason="the figures are those of float32")
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gemma3_text", "gpt_oss", "deepseek_v3", "deepseek_v32", "longcat_flash", "deepseek_v41"),
        *("llama4", "falcon_h1", "mamba2", "nemotron_h", "rwkv7", "jamba", "qwen3_next", "plamo2"),
    ],
)
def test_caches_of_every_kind_are_counted(name):
    """Plain ones, windows, MLA, several per layer, an architecture's own, chunks, states; beyond their windows."""
    tokens = 256  # mlx-lm's caches grow by so many
    if current().replace_kernels:
        cpu_layers.replace_functions()
    expected = inspect_architecture(models.config(name)).cache_values(tokens, 1) * 4
    model = models.build(name)
    cache = caches.new_cache(model)
    model(mx.array([[n % models.VOCAB for n in range(tokens - 1)]]), cache=cache)
    model(mx.array([[1]]), cache=cache)
    mx.eval([layer.state for layer in cache])
    assert expected == pytest.approx(caches.cache_bytes(cache), rel=0.15)


def test_towers_for_images_are_not_part_of_a_text_models_weights(tmp_path):
    path = tiny_llama(tmp_path / "m")
    stored = checkpoint_metadata(str(path)).stored_bytes
    towers = ("vision_tower.a", "model.visual.a", "language_model.vision_model.a", "multi_modal_projector.a", "mtp.a")
    image = {f"{name}.weight": mx.zeros((64, 64)) for name in towers}
    mx.save_safetensors(str(path / "model-2.safetensors"), image | {"visual_head.weight": mx.zeros((2, 64))})
    header = int.from_bytes((path / "model-2.safetensors").read_bytes()[:8], "little")
    assert checkpoint_metadata(str(path)).stored_bytes == stored + 8 + header + 2 * 64 * 4


def test_towers_of_a_copy_in_the_hubs_cache_are_not_either(tmp_path, monkeypatch):
    path = tiny_llama(tmp_path / "m")
    mx.save_safetensors(str(path / "model-2.safetensors"), {"vision_tower.a.weight": mx.zeros((64, 64))})
    in_hub(tmp_path / "hub", "org/seeing", path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found, expected = checkpoint_metadata("org/seeing"), checkpoint_metadata(str(path))
    assert (found.stored_bytes, found.tower_bytes) == (expected.stored_bytes, 64 * 64 * 4)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{]"]
)
def test_a_file_of_weights_without_a_header_counts_whole(tmp_path, content):
    path = tiny_llama(tmp_path / "m")
    stored = checkpoint_metadata(str(path)).stored_bytes
    (path / "model-2.safetensors").write_bytes(content)
    assert checkpoint_metadata(str(path)).stored_bytes == stored + len(content)
