"""Estimates made before a load, beside what the load really took."""

import engine  # noqa: F401  (first: it prepares the process for MLX)

# isort: split
import gc
import json

import pytest

from engine import device, loader, memory
from engine.config import ModelSpec
from engine.errors import LoadFailed
from engine.kv import token_bytes
from engine.memory import DEFAULT_CACHE_TOKENS, Limits
from tests.models import tiny_llama
from tests.tiny_gguf import CONTEXT, write_tiny_gguf

SHAPES = [(64, 2), (256, 8), (512, 3)]


def measured_load(spec):
    """The model, and the bytes that live arrays took more after its load."""
    gc.collect()
    before = device.active_bytes()
    loaded = loader.load(spec)
    return loaded, device.active_bytes() - before


@pytest.mark.skipif(not device.is_cpu(), reason="the figures are those of float32")
@pytest.mark.parametrize(("hidden", "layers"), SHAPES)
def test_the_weights_are_estimated_within_15_percent(tmp_path, hidden, layers):
    spec = ModelSpec("m", str(tiny_llama(tmp_path / "m", hidden=hidden, layers=layers)))
    estimate = memory.estimate(spec)
    loaded, taken = measured_load(spec)
    assert estimate.weights == loaded.weight_bytes
    assert abs(estimate.weights - taken) <= 0.15 * taken
    assert estimate.cache == loaded.limits.cache_tokens * token_bytes(loaded.model)


@pytest.mark.skipif(not device.is_cpu(), reason="the figures are those of float32")
def test_the_embedded_model_is_estimated_within_15_percent():
    spec = ModelSpec("m", "embedded:smollm2")
    estimate = memory.estimate(spec)
    loaded, taken = measured_load(spec)
    assert abs(estimate.weights - taken) <= 0.15 * taken
    assert estimate.cache == loaded.limits.cache_tokens * token_bytes(loaded.model)


def test_a_gguf_file_is_estimated_from_its_header_before_it_is_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SERVER_CACHE", str(tmp_path / "cache"))
    spec = ModelSpec("m", str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    before = memory.estimate(spec)
    assert not (tmp_path / "cache").exists()
    loaded = loader.load(spec)
    assert memory.estimate(spec) == before
    assert loaded.context_length == CONTEXT
    if device.is_cpu():
        assert before.weights == loaded.weight_bytes


@pytest.mark.parametrize(
    ("fields", "own", "limits"),
    [
        ({}, 2048, Limits(2048, DEFAULT_CACHE_TOKENS)),
        ({"max_running": 4}, 2048, Limits(2048, 8192)),
        ({}, 131_072, Limits(DEFAULT_CACHE_TOKENS, DEFAULT_CACHE_TOKENS)),
        ({"context_length": 131_072}, 131_072, Limits(131_072, 131_072)),
        ({"context_length": 512, "max_running": 2}, 2048, Limits(512, 1024)),
        ({"cache_tokens": 1000}, 2048, Limits(1000, 1000)),
    ],
)
def test_the_cache_has_an_ordinary_size_unless_it_is_told_another(fields, own, limits):
    assert memory.limits(ModelSpec("m", "x", **fields), own) == limits


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "its config.json can't be used: KeyError"),
        ({"model_type": "martian"}, "Model type martian not supported"),
        ({"model_type": "llama"}, "its config.json can't be used: TypeError"),
        ([], "has no object in it"),
    ],
)
def test_a_model_that_can_not_be_understood_is_refused_before_anything_is_read(tmp_path, config, complaint):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadFailed, match=complaint):
        memory.estimate(ModelSpec("m", str(tmp_path)))


def test_layers_with_a_window_keep_no_more_than_that():
    anatomy = memory.Anatomy(weights=0, layers=((10, 0), (10, 100)), row_values=7, width=0, vocab=0)
    assert anatomy.cache_values(tokens=1000, rows=2) == 10 * 1000 + 10 * 200 + 2 * 7


def test_the_budget_is_the_limit_or_a_share_of_the_device():
    assert memory.budget(123) == 123
    assert 0 < memory.budget(0) < device.describe().memory_bytes
