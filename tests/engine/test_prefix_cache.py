"""The prefix cache: entries that contain NaN or inf are never reused."""

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.prefix_cache import PrefixCache
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.batch_driver import Driver, prompt, sequence

POISON = 301  # a token that prompt() never has
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
def test_a_number_that_is_not_finite_anywhere_is_found_in_the_last_layer(model, number, position):
    model.model.embed_tokens.weight[POISON] = number
    assert caches.is_finite(filled(model, PROMPT)).item()
    tokens = [*PROMPT[:position], POISON, *PROMPT[position + 1 :]]
    assert not caches.is_finite(filled(model, tokens)).item()


def test_an_entry_with_nan_is_not_fetched_but_a_shorter_sound_one(model):
    model.model.embed_tokens.weight[POISON] = mx.nan
    prefixes = PrefixCache(1 << 30)
    prefixes.store([*PROMPT[:30], POISON], filled(model, [*PROMPT[:30], POISON]))
    prefixes.store([*PROMPT[:20], 7, 7], filled(model, [*PROMPT[:20], 7, 7]))
    assert prefixes.fetch([*PROMPT[:30], POISON, 5])[1] == 20
    assert prefixes.fetch(PROMPT)[1] == 20


def test_ranks_that_share_a_model_do_not_look_for_nan(model):
    model.model.embed_tokens.weight[POISON] = mx.nan
    prefixes = PrefixCache(1 << 30, bytes_per_token=8)
    prefixes.store([*PROMPT, POISON], filled(model, [*PROMPT, POISON]))
    assert prefixes.fetch([*PROMPT, POISON, 5])[1] == 41


def test_a_sequence_that_overflowed_changes_no_answer_after_it(model):
    model.model.embed_tokens.weight[POISON] = mx.nan
    answer = Driver(Scheduler(model), sequence(1, PROMPT)).finish()[1]
    driver = Driver(Scheduler(model, prefix_cache=PrefixCache(1 << 30)), sequence(1, [*PROMPT[:30], POISON]))
    driver.finish()
    driver.add(sequence(2, PROMPT))
    assert driver.finish()[2] == answer
    assert driver.cached[2] == 0
    driver.add(sequence(3, PROMPT))
    assert driver.finish()[3] == answer
    assert driver.cached[3] == 39
