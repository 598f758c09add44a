"""Loads of a model with a draft model: what is refused, what is counted, and that answers are the same."""

import gc
import shutil
from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.runners.drafts import load_draft
from mlxserver.engine.sequence import Sequence
from mlxserver.engine.worker.engine import Engine
from tests.support.architectures import CONFIGS, write_random_model
from tests.support.scripted_engine import read, request, within_deadline
from tools.harness.models import scripted_model, tiny_llama


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def target(directory):
    return tiny_llama(directory / "target", hidden=128, layers=2)


def spec(target, draft, **fields):
    fields = {"cache_tokens": 1024, "max_running": 2, "speculation": "always", **fields}
    return ModelSpec("m", str(target), draft="d", drafter=ModelSpec("d", str(draft)), **fields)


def refusal(*arguments, **fields):
    with pytest.raises(LoadFailed) as failed:
        Builder(0.25).build(spec(*arguments, **fields))
    gc.collect()
    return failed.value.cause


def test_a_draft_of_another_vocabulary_is_refused(directory, target):
    larger = scripted_model(directory / "larger", {"": "Yes."}, tokens=["<think>"])
    cause = refusal(target, larger)
    assert cause.startswith("its draft 'd' has another vocabulary: ")
    assert all(part in cause for part in (" tokens, where 'm' has ",))
    renamed = shutil.copytree(target, directory / "renamed")
    for file in renamed.glob("*.json"):
        file.write_text(file.read_text().replace("<|im_start|>", "<|im_begin|>"))
    cause = refusal(target, renamed)
    assert "is '<|im_begin|>', where 'm' has '<|im_start|>'" in cause


def test_a_draft_whose_cache_cannot_be_trimmed_is_refused(directory, target):
    sliding = write_random_model(directory / "sliding", {"model_type": "gemma3_text"} | CONFIGS["gemma3_text"])
    assert refusal(target, sliding) == ("its draft 'd' has a KV cache that can't be trimmed (KVCache, RotatingKVCache)")


def test_a_draft_that_is_no_text_model_or_cannot_be_loaded_is_refused(directory, target):
    assert refusal(target, directory / "missing").startswith("its draft 'd' could not be loaded: ")
    with pytest.raises(LoadFailed, match="of kind embedding; expected a text model"):
        Builder(0.25).build(
            ModelSpec("m", str(target), draft="d", drafter=ModelSpec("d", str(target), kind="embedding"))
        )


def test_a_draft_that_would_have_no_use_is_not_loaded(directory, target):
    alone = Builder(0.25).build(ModelSpec("m", str(target))).facts
    off = Builder(0.25).build(spec(target, target, speculation="off")).facts
    assert (off.weight_bytes, off.execution.draft) == (alone.weight_bytes, None)
    sliding = write_random_model(directory / "window", {"model_type": "gemma3_text"} | CONFIGS["gemma3_text"])
    assert Builder(0.25).build(spec(sliding, target)).facts.execution.draft is None


def test_both_models_are_counted(target):
    own, alone = estimate(spec(target, target)), estimate(ModelSpec("m", str(target), cache_tokens=1024, max_running=2))
    assert (own.weights, own.cache) == (2 * alone.weights, 2 * alone.cache)
    assert own.activations == alone.activations
    facts = Builder(0.25).build(spec(target, target)).facts
    assert facts.execution.draft == "d"
    assert facts.weight_bytes == own.weights
    assert facts.reserved_kv_bytes == own.cache


def test_a_draft_that_is_not_loaded_is_not_counted(target):
    compiled, plain = replace(CPU, compile_steps=True, pad_slots=True, warm_up_all_batch_sizes=True), CPU
    fields = {"cache_tokens": 1024, "max_running": 2}
    alone = {policy: estimate(ModelSpec("m", str(target), **fields), policy) for policy in (compiled, plain)}
    for speculation, policy, fixed, is_loaded in [
        ("off", plain, {}, False),
        ("auto", plain, {}, True),
        ("auto", plain, {"compile_steps": True}, False),
        ("auto", plain, {"compile_steps": True, "pad_slots": False}, True),  # which can't be had; the load fails
        ("auto", compiled, {}, False),
        ("auto", compiled, {"compile_steps": False}, True),
        ("always", compiled, {}, True),
    ]:
        own = estimate(spec(target, target, speculation=speculation, policy=fixed), policy)
        assert (own.weights, own.cache) == (
            (1 + is_loaded) * alone[policy].weights,
            (1 + is_loaded) * alone[policy].cache,
        )


def test_a_draft_that_was_not_counted_is_not_loaded_whatever_was_measured_of_the_model(target, without_compilation):
    compiled = replace(CPU, compile_steps=True, pad_slots=True, warm_up_all_batch_sizes=True)
    model = spec(target, target, speculation="auto")
    loaded = loader.load(model)
    for device_policy, draft in ((compiled, None), (CPU, "d")):
        found = load_draft(model, loaded, CPU, device_policy, "text", lambda *_: None)
        assert (found and found.key) == draft


@pytest.mark.skipif(not device.is_cpu(), reason="only a CPU writes the scores out")
def test_both_take_no_more_than_was_estimated(directory):
    larger = tiny_llama(directory / "larger-target", hidden=256, layers=4)
    expected = estimate(spec(larger, larger))
    gc.collect()
    before, metrics = device.active_bytes(), ModelMetrics("")
    batch = Builder(stall_target=10.0).build(spec(larger, larger), metrics=metrics).batch
    mx.reset_peak_memory()
    batch.insert([Sequence(1, tuple(n % 300 for n in range(900)), SamplingParams(temperature=0.0), 60)])
    tokens = 0
    while tokens < 60:
        tokens += len(batch.decode())
        batch.prefill()
    taken = mx.get_peak_memory() - before
    batch.close()
    assert metrics.accepted_tokens > 30
    assert expected.weights < taken <= expected.total


@within_deadline
async def test_answers_end_at_stop_strings_and_limits_as_without_a_draft(target):
    async def answers(spec):
        engine = Engine("m", lambda: Builder(0.25).build(spec))
        await engine.started()
        try:
            plain = replace(request("hello", 40), sampling={"temperature": 0.0})
            whole = await read(engine.submit(await engine.preprocess(plain)))
            text = "".join(getattr(event, "text", "") for event in whole)
            stopping = replace(plain, stop=(text[12:15],))
            return whole, await read(engine.submit(await engine.preprocess(stopping)))
        finally:
            await engine.stop()

    with_draft = await answers(spec(target, target))
    without = await answers(ModelSpec("m", str(target), cache_tokens=1024, max_running=2, speculation="off"))
    assert with_draft == without
