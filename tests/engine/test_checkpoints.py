"""Prefix reuse where a KV cache can't be trimmed: checkpoints of sliding windows and states."""

from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.engine.kv_cache import caches, checkpoints
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import CONFIGS, random_model
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.prefixes import Asked, new_prefixes

UNTRIMMABLE = ["mamba", "nemotron_h", "jamba", "rwkv7", "olmo_hybrid", "baichuan_m1", "gemma3_text"]
SYSTEM, OPENING = prompt(60, seed=1), (7, 8, 9)
QUESTIONS = [prompt(length, seed=length) for length in (50, 45, 40)]


def test_a_model_needs_checkpoints_unless_all_layers_keep_all_tokens():
    names = set(CONFIGS) - {"llama4"}
    assert {name for name in names if checkpoints.needs_checkpoints(random_model(name))} == set(UNTRIMMABLE)


@pytest.mark.parametrize("name", ["llama", *UNTRIMMABLE, "kimi_k25"])
def test_turns_of_a_conversation_compute_what_is_new(name):
    asked = Asked(random_model(name), new_prefixes())
    first = SYSTEM + QUESTIONS[0] + OPENING
    answer, cached = asked.ask(first, (60, 110))
    assert cached == 0
    assert asked.ask(first, (60, 110))[1] == len(first) - 1
    history = first + answer
    second = history + QUESTIONS[1] + OPENING
    assert asked.ask(second, (60, len(history), len(second) - 3))[1] >= len(history) - 1
    edited = history + QUESTIONS[2] + OPENING
    assert asked.ask(edited, (60, len(history), len(edited) - 3))[1] >= len(history)
    without_reasoning = SYSTEM + QUESTIONS[0] + answer[4:] + QUESTIONS[1]
    assert asked.ask(without_reasoning)[1] == 110
    assert asked.ask(SYSTEM + QUESTIONS[2] + OPENING, (60, 100))[1] == 60


@pytest.mark.parametrize("name", ["olmo_hybrid", "baichuan_m1", "gemma3_text", "mamba"])
def test_a_long_prompt_has_checkpoints_at_an_interval(name):
    asked = Asked(random_model(name), new_prefixes(), checkpoint_interval=100)
    long = prompt(570)
    asked.ask(long)
    assert asked.ask(long[:450] + prompt(50, seed=3))[1] == 400
    assert asked.ask(long[:130] + prompt(50, seed=4))[1] == 100


@pytest.mark.parametrize("name", ["olmo_hybrid", "gemma3_text", "baichuan_m1"])
def test_a_prompt_that_is_left_in_the_middle_is_gone_on_from_where_it_was(name):
    asked = Asked(random_model(name), new_prefixes(), stall_target=0.0001)
    long, driver = prompt(900), asked.driver
    driver.add(replace(sequence(0, long, max_tokens=100), boundaries=(30,)))
    for _ in range(3):
        driver.step()
    driver.scheduler.remove([0])
    assert 30 <= asked.ask(long)[1] < 899


@pytest.mark.parametrize("name", ["olmo_hybrid", "gemma3_text", "baichuan_m1"])
def test_prompts_with_other_boundaries_are_prefilled_together(name):
    model = random_model(name)
    prompts = [SYSTEM + prompt(length, seed=length) for length in (20, 31, 90)]
    each = [replace(sequence(n, tokens), boundaries=(20 + 20 * n, 70)) for n, tokens in enumerate(prompts)]
    driver = Driver(Scheduler(model, prefixes=new_prefixes()), *each)
    answers = driver.finish()
    assert answers == {n: Driver(Scheduler(model), sequence(n, tokens)).finish()[n] for n, tokens in enumerate(prompts)}


@pytest.mark.parametrize("name", UNTRIMMABLE)
def test_a_checkpoint_has_no_more_than_a_sequence_s_windows_and_states(name):
    model = random_model(name)
    cache = caches.new_cache(model)
    model(mx.array([prompt(300)]), cache=cache)
    part = checkpoints.checkpoint_part(cache)
    sizes = caches.cache_sizes(model)
    assert (
        0 < caches.cache_bytes(part) <= sizes.checkpoint * 1.2
    )  # the size of a convolution's state is not known early
    kept = checkpoints.trimmable_part(cache)
    assert checkpoints.is_empty(kept) == (sizes.per_token == 0)
    assert not checkpoints.is_whole(kept)


@pytest.mark.parametrize("name", ["mamba", "rwkv7", "baichuan_m1"])
def test_models_without_plain_layers_keep_prefixes_within_the_memory_of_their_kv_cache(name):
    model = random_model(name)
    sizes = caches.cache_sizes(model)
    prefixes = new_prefixes()
    driver = Driver(Scheduler(model, prefixes=prefixes, max_kv_tokens=2000, max_running=6))
    for n in range(8):
        driver.add(sequence(n, prompt(100, seed=n)))
        driver.finish()
    assert 0 < prefixes.nbytes <= sizes.total(2000, 6)
    driver.add(sequence(8, (*prompt(100, seed=7), *driver.tokens[7], 5)))
    driver.finish()
    assert driver.cached[8] >= 107


def test_stops_are_boundaries_multiples_of_the_interval_and_the_end():
    assert checkpoints.stops((5, 40, 400), length=100, done=10, interval=30) == [30, 40, 60, 90, 99]
    assert checkpoints.stops((), length=20, done=19, interval=4096) == []


@given(st.sets(st.integers(1, 10_000), min_size=1, max_size=40))
def test_the_first_and_the_latest_checkpoints_stay(lengths):
    ordered = sorted(lengths)
    kept = [length for length in ordered if length not in checkpoints.superfluous(ordered)]
    assert len(kept) == min(8, len(ordered))
    assert kept[0] == ordered[0] and kept[-3:] == ordered[-3:]


def test_ranks_count_checkpoints_by_their_size_on_every_rank():
    model = random_model("olmo_hybrid")
    prefixes = new_prefixes(bytes_per_token=10, bytes_per_checkpoint=1000)
    tokens = list(range(40))
    cache = caches.new_cache(model)
    model(mx.array([tokens]), cache=cache)
    prefixes.store_checkpoint(tokens, cache)
    assert prefixes.nbytes == 1000
    prefixes.store(tokens, cache)
    assert prefixes.nbytes == 1000 + 40 * 10
