"""A batch within a KV budget: a preempted sequence resumes later as if it had never waited."""

from dataclasses import replace

import pytest
from mlx_lm import load

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.kv_cache.caches import bytes_per_token
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.batch_driver import GREEDY, SEEDED, Driver, prompt, sequence
from tests.support.prefixes import new_prefixes

# With seed 11 a token lies on the edge of top_p: rounding decides, which depends on what was computed together.
PENALIZED = replace(SEEDED, seed=12, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def sequences(sampling):
    return [sequence(n, prompt(40 + 13 * n, seed=n), sampling, max_tokens=300) for n in range(6)]


def run(model, sequences, limit=None, **options):
    # Chunks as long as they may be: on a busy machine they would be shorter, and values near a tie come out otherwise.
    driver = Driver(Scheduler(model, max_kv_tokens=limit, stall_target=60.0, **options), *sequences)
    most = running = 0
    while not driver.scheduler.is_empty():
        driver.step()
        batch = driver.scheduler._running
        running = max(running, len(batch.sequences))
        if len(batch.sequences) > 1:
            most = max(most, batch.cache.held_tokens)
    return driver.tokens, most, running


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALIZED], ids=["greedy", "seeded", "penalized"])
def test_preempted_sequences_generate_the_same(model, sampling):
    free, _, together = run(model, sequences(sampling))
    bound, most, running = run(model, sequences(sampling), limit=1200)
    assert bound == free
    assert together == 6
    assert 1 < running < 6
    assert most <= 1200


def test_the_prefix_cache_gives_way_to_sequences(model):
    prefixes = new_prefixes()
    limit = 1500
    driver = Driver(Scheduler(model, max_kv_tokens=limit, prefixes=prefixes), sequence(0, prompt(600), max_tokens=4))
    driver.finish()
    assert prefixes.nbytes >= 600 * bytes_per_token(model)
    driver.add(sequence(1, prompt(900, seed=1), max_tokens=4))
    driver.until_generated(1)
    assert prefixes.nbytes <= (limit - 900) * bytes_per_token(model)
    driver.finish()


def test_a_prompt_that_needs_the_budget_for_itself_reuses_its_prefix(model):
    """The prefix is fetched before it is dropped: a conversation of half a budget is not computed anew every turn."""
    driver = Driver(Scheduler(model, max_kv_tokens=1300, prefixes=new_prefixes()), sequence(0, prompt(600)))
    first = driver.finish()[0]
    driver.add(sequence(1, (*prompt(600), *first[:-1], *prompt(20, seed=1))))
    driver.finish()
    assert driver.cached[1] >= 600


def test_the_kv_cache_of_a_preempted_sequence_stays_as_a_prefix_where_it_fits(model):
    prefixes, limit = new_prefixes(), 1300
    scheduler = Scheduler(model, max_kv_tokens=limit, prefixes=prefixes)
    driver = Driver(scheduler, sequence(0, prompt(300), max_tokens=300))
    driver.until_generated(0)
    driver.add(sequence(1, prompt(250, seed=1), max_tokens=300))
    driver.until_generated(1)
    driver.until(lambda: scheduler.waiting() == {1})
    assert prefixes.nbytes >= (250 + len(driver.tokens[1])) * bytes_per_token(model)
    driver.finish()
    assert [len(tokens) for tokens in driver.tokens.values()] == [300, 300]


def test_a_single_sequence_may_always_go_on(model):
    free, _, _ = run(model, sequences(GREEDY)[:1])
    assert run(model, sequences(GREEDY)[:1], limit=16)[0] == free


def test_choices_that_do_not_fit_together_come_one_by_one(model):
    scheduler = Scheduler(model, max_kv_tokens=700)
    driver = Driver(scheduler)
    driver.add_choices(
        *(sequence(n, prompt(200), SamplingParams(temperature=1.0, seed=n), max_tokens=5) for n in range(4))
    )
    assert [len(tokens) for tokens in driver.finish().values()] == [5] * 4
