"""Log-probabilities of prompts: those of one plain forward pass, however the prompt is prefilled."""

from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.platform.policy import CPU, CUDA
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import random_model
from tests.support.batch_driver import SEEDED, Driver, prompt, sequence
from tests.support.prefixes import new_prefixes

MOST = 3


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


@pytest.fixture(params=["plain", "bucketed"])
def policy(request):
    return CPU if request.param == "plain" else replace(CUDA, compile_steps=False)


def plain(model, tokens):
    logits = model(mx.array([tokens]), cache=caches.new_cache(model))[0].astype(mx.float32)
    return (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()


def check(model, tokens, scored):
    assert len(scored) == len(tokens) - 1
    for token, row, logprobs in zip(tokens[1:], plain(model, tokens), scored, strict=False):
        assert logprobs.chosen == pytest.approx(row[token], abs=1e-3)
        best = sorted(range(len(row)), key=lambda id: -row[id])
        assert [value for _, value in logprobs.top] == pytest.approx([row[id] for id in best[:MOST]], abs=1e-3)
        assert abs(logprobs.rank - 1 - best.index(token)) <= 1  # two may be as likely but for a rounding


@pytest.mark.parametrize("length", [1, 2, 33, 128, 129, 130, 400])
def test_a_prompt_of_any_length_has_the_log_probabilities_of_a_plain_forward_pass(model, policy, length):
    tokens = prompt(length, seed=length)
    driver = Driver(Scheduler(model, policy=policy), sequence(1, tokens, max_tokens=2, prompt_logprobs=MOST))
    generated = driver.finish()
    check(model, tokens, driver.prompt_logprobs[1])
    assert generated == Driver(Scheduler(model, policy=policy), sequence(1, tokens, max_tokens=2)).finish()


@pytest.mark.parametrize("name", ["gemma3_text", "mamba"])
def test_a_prompt_is_scored_where_layers_keep_a_window_or_a_state(name):
    model, tokens = random_model(name), prompt(200, seed=1)
    driver = Driver(Scheduler(model), sequence(1, tokens, max_tokens=1, prompt_logprobs=MOST))
    driver.finish()
    check(model, tokens, driver.prompt_logprobs[1])


def test_a_scored_prompt_changes_no_other_and_none_changes_it(model, policy):
    others = [sequence(n, prompt(20 * n, seed=n), SEEDED, 12) for n in (1, 2)]
    expected = Driver(Scheduler(model, policy=policy), *others).finish()
    driver = Driver(Scheduler(model, policy=policy), others[0])
    driver.until_generated(1, 3)
    tokens = prompt(300, seed=9)
    driver.add(sequence(3, tokens, prompt_logprobs=MOST), others[1], sequence(4, prompt(5), prompt_logprobs=MOST))
    generated = driver.finish()
    assert {id: generated[id] for id in (1, 2)} == expected
    check(model, tokens, driver.prompt_logprobs[3])
    check(model, prompt(5), driver.prompt_logprobs[4])
    assert set(driver.prompt_logprobs) == {3, 4}


def test_a_cached_prefix_is_read_again_where_it_is_scored_and_is_stored_for_others(model):
    scheduler, tokens = Scheduler(model, prefixes=new_prefixes()), prompt(100)
    driver = Driver(scheduler, sequence(1, tokens))
    driver.finish()
    driver.add(sequence(2, tokens, prompt_logprobs=MOST))
    driver.finish()
    check(model, tokens, driver.prompt_logprobs[2])
    driver.add(sequence(3, tokens))
    driver.finish()
    assert (driver.cached[2], driver.cached[3]) == (0, len(tokens) - 1)
    assert driver.tokens[1] == driver.tokens[2] == driver.tokens[3]


def test_all_choices_of_a_prompt_have_its_log_probabilities(model):
    tokens = prompt(50)
    driver = Driver(Scheduler(model))
    choices = [sequence(n, tokens, SamplingParams(seed=n), prompt_logprobs=MOST) for n in (1, 2)]
    driver.add_choices(*choices)
    driver.finish()
    check(model, tokens, driver.prompt_logprobs[1])
    assert driver.prompt_logprobs[1] == driver.prompt_logprobs[2]


def test_preemption_repeats_no_log_probabilities_and_loses_none(model):
    """The KV cache is full when both prompts have grown: the younger waits, and goes on behind its own tokens."""
    prompts = {n: prompt(180, seed=n) for n in (1, 2)}
    driver = Driver(Scheduler(model, max_kv_tokens=900))
    driver.add(*(sequence(n, tokens, max_tokens=150, prompt_logprobs=MOST) for n, tokens in prompts.items()))
    driver.finish()
    for n, tokens in prompts.items():
        check(model, tokens, driver.prompt_logprobs[n])
        assert len(driver.tokens[n]) == 150
