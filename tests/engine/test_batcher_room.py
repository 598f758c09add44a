"""A batch within a limit of tokens: who has to wait again goes on later as if nothing had been."""

from dataclasses import replace

import pytest
from mlx_lm import load

from mlxserver.engine.kv_cache.caches import bytes_per_token
from mlxserver.engine.kv_cache.prefix_cache import PrefixCache
from mlxserver.engine.requests import Sampling
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.batch_driver import GREEDY, SEEDED, Driver, prompt, row

PENALIZED = replace(SEEDED, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def rows(sampling):
    return [row(n, prompt(40 + 13 * n, seed=n), sampling, max_tokens=300) for n in range(6)]


def run(model, rows, limit=None, **options):
    driver = Driver(Scheduler(model, max_kv_tokens=limit, **options), *rows)
    most = running = 0
    while not driver.batcher.is_empty():
        driver.step()
        decoding = driver.batcher._decoding
        running = max(running, len(decoding.rows))
        if len(decoding.rows) > 1:
            most = max(most, decoding.places.tokens_for(len(decoding.rows), 1))
    return driver.tokens, most, running


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALIZED], ids=["greedy", "seeded", "penalized"])
def test_rows_that_had_to_wait_again_say_the_same(model, sampling):
    free, _, together = run(model, rows(sampling))
    bound, most, running = run(model, rows(sampling), limit=1200)
    assert bound == free
    assert together == 6
    assert 1 < running < 6
    assert most <= 1200


def test_kept_prefixes_give_way_to_rows(model):
    cache = PrefixCache(1 << 30)
    limit = 1500
    driver = Driver(Scheduler(model, max_kv_tokens=limit, prefix_cache=cache), row(0, prompt(600), max_tokens=4))
    driver.finish()
    assert cache.nbytes >= 600 * bytes_per_token(model)
    driver.add(row(1, prompt(900, seed=1), max_tokens=4))
    driver.until_said(1)
    assert cache.nbytes <= (limit - 900) * bytes_per_token(model)
    driver.finish()


def test_what_a_row_said_that_has_to_wait_again_is_kept_where_there_is_room(model):
    kept, limit = PrefixCache(1 << 30), 1300
    batcher = Scheduler(model, max_kv_tokens=limit, prefix_cache=kept)
    driver = Driver(batcher, row(0, prompt(300), max_tokens=300))
    driver.until_said(0)
    driver.add(row(1, prompt(250, seed=1), max_tokens=300))
    driver.until_said(1)
    driver.until(lambda: batcher.waiting() == {1})
    assert kept.nbytes >= (250 + len(driver.tokens[1])) * bytes_per_token(model)
    driver.finish()
    assert [len(said) for said in driver.tokens.values()] == [300, 300]


def test_a_single_row_may_always_go_on(model):
    free, _, _ = run(model, rows(GREEDY)[:1])
    assert run(model, rows(GREEDY)[:1], limit=16)[0] == free


def test_choices_that_do_not_fit_together_come_one_by_one(model):
    batcher = Scheduler(model, max_kv_tokens=700)
    driver = Driver(batcher)
    choices = [row(n, prompt(200), Sampling(temperature=1.0, seed=n), max_tokens=5) for n in range(4)]
    driver.rows = {choice.id: choice for choice in choices}
    driver.tokens = {choice.id: [] for choice in choices}
    batcher.insert(choices)
    assert [len(said) for said in driver.finish().values()] == [5] * 4
