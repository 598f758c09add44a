"""Chunks that are launched, and what follows them prepared before they are done: nothing else changes."""

import random
import time
from dataclasses import replace

import pytest
from mlx_lm import load

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.platform.policy import CPU, CUDA
from mlxserver.engine.scheduler.load_meter import LoadMeter
from mlxserver.engine.scheduler.prefill import Prefill
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import random_model
from tests.support.batch_driver import GREEDY, SEEDED, Driver, prompt, sequence
from tests.support.prefixes import new_prefixes

BUCKETED = replace(CUDA, compile_steps=False)
PLAIN = replace(CPU, async_chunks=True)

pytestmark = pytest.mark.usefixtures("without_compilation")


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def alone(model, one):
    return Driver(Scheduler(model, policy=CPU), one).finish()[one.id]


@pytest.mark.parametrize("policy", [BUCKETED, PLAIN], ids=["bucketed", "plain"])
def test_a_random_traffic_of_joins_and_leaves_changes_no_answer(model, policy):
    """Every sequence's tokens are the beginning of those it has alone."""
    chance = random.Random(7)
    driver = Driver(Scheduler(model, max_running=4, policy=policy, prefixes=new_prefixes()))
    for n in range(20):
        start = prompt(chance.choice([1, 20, 300, 700]), seed=chance.randrange(3))
        sampling = chance.choice([GREEDY, SamplingParams(temperature=0.0, presence_penalty=0.5)])
        driver.add(sequence(n, (*start, *prompt(chance.randrange(5), seed=n)), sampling, chance.randrange(1, 12)))
        for _ in range(chance.randrange(4)):
            driver.step()
        if chance.random() < 0.3:
            driver.scheduler.remove([chance.randrange(n + 1)])
    driver.finish()
    for n, tokens in driver.tokens.items():
        assert tokens == alone(model, driver.sequences[n])[: len(tokens)]


@pytest.mark.parametrize("name", ["gemma3_text", "jamba", "rwkv7"])
def test_layers_of_other_kinds_than_plain_ones_are_the_same(name):
    model = random_model(name)
    asked = [sequence(n, prompt(length, seed=n), max_tokens=5) for n, length in enumerate((3, 90, 41))]
    driver = Driver(Scheduler(model, policy=PLAIN, prefixes=new_prefixes()), *asked)
    assert driver.finish() == {one.id: alone(model, one) for one in asked}


def test_prompts_resume_from_a_restart_while_a_chunk_is_under_way(model):
    asked = [sequence(1, prompt(600), max_tokens=6), sequence(2, prompt(30, seed=2), SEEDED, 6)]
    scheduler = Scheduler(model, policy=BUCKETED)
    driver = Driver(scheduler, *asked)
    driver.step()
    assert scheduler.restart([1, 2]) == []
    assert driver.finish() == {one.id: alone(model, one) for one in asked}


def test_a_chunk_is_measured_when_the_next_one_waits_for_it(model):
    scheduler = Scheduler(model, policy=BUCKETED)
    measured = []
    scheduler._prefill.times.note = lambda tokens, seconds: measured.append(tokens)
    scheduler.insert([sequence(1, prompt(900))])
    scheduler.prefill()
    assert measured == []
    scheduler.prefill()
    assert len(measured) == 1
    scheduler.close()


def test_a_chunk_is_not_waited_for_twice(model):
    prefill = Prefill(model, stall_target=0.25, policy=BUCKETED)
    assert not prefill.settle()


def test_the_step_behind_a_chunk_is_measured_from_the_end_of_the_chunk():
    meter = LoadMeter(assumed=5.0)
    meter.begin_step(launched=time.monotonic() - 1000)
    meter.delay_step()
    meter.end_step()
    assert meter.load.step_seconds < 500
