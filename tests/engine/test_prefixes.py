"""What a row that overflowed leaves to those who ask alike after it: nothing."""

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.prefix_cache import PrefixCache
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.batch_driver import Driver, prompt, row

POISON = 301  # a token that the prompts of test_batcher do not have
PROMPT = prompt(40, seed=5)


@pytest.fixture
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def filled(model, tokens):
    cache = caches.new_cache(model)
    model(mx.array([list(tokens)]), cache=cache)
    return cache


@pytest.mark.parametrize("number", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("position", [0, 20, 39])
def test_a_cache_that_is_no_number_anywhere_is_known_by_its_last_layer(model, number, position):
    model.model.embed_tokens.weight[POISON] = number
    assert caches.is_finite(filled(model, PROMPT)).item()
    tokens = [*PROMPT[:position], POISON, *PROMPT[position + 1 :]]
    assert not caches.is_finite(filled(model, tokens)).item()


def test_what_is_no_number_is_not_fetched_but_what_is_shorter_and_sound(model):
    model.model.embed_tokens.weight[POISON] = mx.nan
    kept = PrefixCache(1 << 30)
    kept.store([*PROMPT[:30], POISON], filled(model, [*PROMPT[:30], POISON]))
    kept.store([*PROMPT[:20], 7, 7], filled(model, [*PROMPT[:20], 7, 7]))
    assert kept.fetch([*PROMPT[:30], POISON, 5])[1] == 20
    assert kept.fetch(PROMPT)[1] == 20


def test_ranks_do_not_look_at_their_own_part_of_the_numbers(model):
    model.model.embed_tokens.weight[POISON] = mx.nan
    kept = PrefixCache(1 << 30, bytes_per_token=8)
    kept.store([*PROMPT, POISON], filled(model, [*PROMPT, POISON]))
    assert kept.fetch([*PROMPT, POISON, 5])[1] == 41


def test_a_row_that_overflowed_changes_no_answer_after_it(model):
    model.model.embed_tokens.weight[POISON] = mx.nan
    answer = Driver(Scheduler(model), row(1, PROMPT)).finish()[1]
    driver = Driver(Scheduler(model, prefix_cache=PrefixCache(1 << 30)), row(1, [*PROMPT[:30], POISON]))
    driver.finish()
    driver.add(row(2, PROMPT))
    assert driver.finish()[2] == answer
    assert driver.cached[2] == 0
    driver.add(row(3, PROMPT))
    assert driver.finish()[3] == answer
    assert driver.cached[3] == 39
