"""The self-check at load: which paths serve a model, and that they compute what the model says to a prompt alone."""

import json
import logging
from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest
from mlx.utils import tree_flatten

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.batched import make_batch_cache
from mlxserver.engine.kv_cache.single import SingleCache
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.requests import Execution
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.scheduler.execution import execution
from tests.support.architectures import BASE, MORE_CONFIGS, random_model
from tools.harness.models import tiny_llama

SLOTS, MERGED = Execution("slots", True, False), Execution("merged", False, False)
SINGLE = Execution("single", False, False)
PADDED = replace(CPU, pad_slots=True, bucket_prefill=True)  # a GPU's paths


def paths(name, policy=CPU):
    model = random_model(name)
    return execution(model, fitting_policy(model, policy, name))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", SLOTS),
        ("kimi_k25", SLOTS),
        ("gemma3_text", Execution("merged", True, False)),
        ("mamba", MERGED),
        ("nemotron_h", MERGED),
        ("llama4", SINGLE),
        ("gemma2", SINGLE),
        ("gpt_bigcode", SINGLE),
        ("afm7", SINGLE),
    ],
)
def test_a_model_runs_along_the_paths_that_it_can_take(name, expected):
    assert paths(name) == expected


@pytest.mark.parametrize(("name", "expected"), [("llama", SLOTS), ("gemma2", SINGLE), ("afm7", SINGLE)])
def test_padded_slots_and_bucketed_chunks_are_checked_too(name, expected):
    assert paths(name, PADDED) == expected


def test_rows_that_are_mixed_up_without_an_error_are_found():
    """Gemma 2 with as many heads as rows: two rows compute, each with the other's mask in half of the heads."""
    model = random_model("gemma2")
    first, second = ([1, 2, 3], [4, 5, 6, 7, 8, 9])
    batch = make_batch_cache(model, CPU)
    batch.join([prefilled(model, first), prefilled(model, second)])
    together = batch.advance(mx.array([10, 11]))
    alone = model(mx.array([[*first, 10]]))[:, -1]
    assert not mx.allclose(together[:1], alone, atol=1e-3)
    assert execution(model, fitting_policy(model, CPU, "gemma2")).cache == "single"


class Padded:
    """A llama whose logits depend on the batch it is in, as if it ignored masks."""

    def __init__(self, model):
        self._model = model
        self.layers, self.args, self.parameters = model.layers, model.args, model.parameters

    def __call__(self, inputs, cache=None):
        return self._model(inputs, cache=cache) * (1.0 if inputs.shape[0] == 1 else 1.5)


class Untraceable(Padded):
    """A llama that evaluates an array in its forward pass."""

    def __call__(self, inputs, cache=None):
        logits = self._model(inputs, cache=cache)
        mx.eval(logits)
        return logits


def test_a_model_that_differs_in_company_runs_alone(caplog):
    model = Padded(random_model("llama"))
    with caplog.at_level(logging.INFO, "engine"):
        policy = fitting_policy(model, CPU, "odd")
    assert execution(model, policy) == SINGLE
    assert "odd: runs as" in caplog.text
    assert "in company" in caplog.text


class Flipping(Padded):
    """A llama that differs in company at first, as if a close choice turned out otherwise."""

    flips = 4

    def __call__(self, inputs, cache=None):
        logits = self._model(inputs, cache=cache)
        if inputs.shape[0] > 1 and self.flips:
            self.flips -= 1
            logits = logits * 1.5
        return logits


def test_what_differs_for_one_set_of_tokens_alone_is_not_turned_off():
    model = Flipping(random_model("llama"))
    assert execution(model, fitting_policy(model, CPU, "odd")) == SLOTS
    assert not model.flips


def test_a_model_that_cannot_be_traced_is_not_compiled():
    model = Untraceable(random_model("llama"))
    policy = fitting_policy(model, replace(PADDED, compile_steps=True), "odd")
    assert not policy.compile_steps
    assert (policy.pad_slots, policy.bucket_prefill, policy.batch_cache) == (True, True, "slots")


def test_a_model_that_cannot_run_alone_raises():
    model = random_model("llama")
    model.model.layers[0].self_attn.q_proj.weight = mx.zeros((3, 3))
    with pytest.raises(ValueError, match="matmul"):
        fitting_policy(model, CPU, "broken")


def prefilled(model, tokens):
    cache = caches.new_cache(model)
    model(mx.array([tokens]), cache=cache)
    return cache


def test_single_caches_decode_as_each_sequence_alone():
    model = random_model("llama4")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
    batch = SingleCache(model)
    batch.join([prefilled(model, prompt) for prompt in prompts[:2]])
    batch.join([prefilled(model, prompts[2])])
    expected = [model(mx.array([[*prompt, 50]]))[0, -1] for prompt in prompts]
    assert mx.allclose(batch.advance(mx.array([50, 50, 50])), mx.stack(expected), atol=1e-4)
    batch.keep([2, 1])
    expected = [model(mx.array([[*prompts[n], 50, 51]]))[0, -1] for n in (2, 1)]
    kept = batch.extract(0)
    assert mx.allclose(batch.advance(mx.array([51, 51])), mx.stack(expected), atol=1e-4)
    assert mx.allclose(model(mx.array([[51]]), cache=kept)[:, -1], expected[0][None], atol=1e-4)


def test_sequences_that_share_a_prompt_have_caches_of_their_own():
    model = random_model("llama4")
    cache = prefilled(model, [1, 2, 3])
    batch = SingleCache(model)
    batch.join([cache, cache])
    batch.advance(mx.array([4, 5]))
    logits = batch.advance(mx.array([6, 6]))
    expected = [model(mx.array([[1, 2, 3, token, 6]]))[0, -1] for token in (4, 5)]
    assert mx.allclose(logits, mx.stack(expected), atol=1e-4)


def directory(path, name):
    """A checkpoint of a random model, with the tokenizer of a tiny llama."""
    tiny_llama(path)
    weights = dict(tree_flatten(random_model(name).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(BASE | {"model_type": name} | MORE_CONFIGS[name]))
    return str(path)


def test_a_model_that_cannot_be_batched_is_built_and_says_so(tmp_path):
    runner = Builder(0.25, policy=CPU).build(ModelSpec("m", directory(tmp_path / "m", "gemma2")))
    assert runner.facts.execution == SINGLE


@pytest.mark.skipif(not device.is_cpu(), reason="a model that a CPU can't compute")
def test_a_model_that_cannot_be_run_at_all_is_refused_with_the_reason(tmp_path):
    source = directory(tmp_path / "m", "bitnet")
    with pytest.raises(LoadFailed, match="could not be loaded: the model can't be run: its architecture needs Metal"):
        Builder(0.25, policy=CPU).build(ModelSpec("m", source))
