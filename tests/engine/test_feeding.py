"""Chunks of prompts: every way of feeding gives a prompt the keys and values that it has by itself."""

from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm import load

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading.metadata import attention_heads
from mlxserver.engine.platform.policy import CUDA
from mlxserver.engine.requests import Sampling
from mlxserver.engine.scheduler.chunks import BucketedPrefill, PendingPrompt, PlainPrefill
from mlxserver.engine.sequence import Sequence
from tests.support.architectures import CONFIGS, random_model


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def placed(model):
    """As on a GPU, but not compiled: here that would cost seconds of the C++ compiler."""
    return BucketedPrefill(model, replace(CUDA, compile_steps=False))


@pytest.fixture(scope="module")
def feed(model):
    return placed(model)


FEEDS = pytest.mark.parametrize("make", [PlainPrefill, placed], ids=["plain", "placed"])


def prompt(model, length, seed=0, done=0):
    tokens = tuple((seed + 7 * n) % 300 for n in range(length))
    made = PendingPrompt([Sequence(seed, tokens, Sampling(), 10)], 0.0, cache=caches.new_cache(model), done=done)
    if done:
        model(mx.array([tokens[:done]]), cache=made.cache)
    return made


def check(model, prompt):
    """The next token's logits are those of the whole text at once."""
    assert prompt.remaining == 0
    assert [layer.offset for layer in prompt.cache] == [prompt.done] * len(prompt.cache)
    logits = model(mx.array([prompt.tokens[-1:]]), cache=prompt.cache)[0, -1]
    assert mx.allclose(logits, model(mx.array([prompt.tokens]))[0, -1], atol=1e-3)


def feed_all(feed, prompts, budget):
    chunks = []
    while waiting := [prompt for prompt in prompts if prompt.remaining]:
        chunk = feed.choose(waiting, budget)
        assert chunk.prompts[0] is waiting[0]
        chunks.append((len(chunk.prompts), chunk.length))
        assert feed.run(chunk) > 0
    return chunks


@FEEDS
@pytest.mark.parametrize("budget", [64, 700, 4096])
def test_prompts_of_all_lengths_are_fed_whole(model, make, budget):
    lengths = (2, 3, 40, 255, 256, 257, 258, 513, 700)
    prompts = [prompt(model, length, seed=n) for n, length in enumerate(lengths)]
    feed_all(make(model), prompts, budget)
    for each in prompts:
        check(model, each)


@FEEDS
def test_a_prompt_goes_on_behind_a_kept_prefix(model, make):
    prompts = [prompt(model, 600, done=590), prompt(model, 300, seed=1, done=20), prompt(model, 300, seed=2)]
    feed_all(make(model), prompts, 4096)
    for each in prompts:
        check(model, each)


def test_a_prompt_s_end_is_not_left_over(model):
    assert feed_all(PlainPrefill(model), [prompt(model, 76)], 64) == [(1, 75)]
    assert feed_all(PlainPrefill(model), [prompt(model, 41), prompt(model, 39, seed=1)], 64) == [(2, 40)]
    assert feed_all(PlainPrefill(model), [prompt(model, 86)], 64) == [(1, 64), (1, 21)]


def test_placed_chunks_have_few_shapes(model):
    prompts = [prompt(model, 240 + n, seed=n) for n in range(15)]
    chunks = feed_all(placed(model), prompts, 4096)
    assert chunks == [(4, 256)] * 3 + [(2, 256), (1, 256)]
    assert feed_all(placed(model), [prompt(model, 3000)], 1100) == [(1, 1024), (1, 1024), (1, 1024)]


def test_a_chunk_finds_the_places_held_by_nobody_else(model):
    """Only then is it written in place."""
    feed, fed, held = placed(model), prompt(model, 1100), []

    def forward(*arguments):
        held.extend(array for layer in fed.cache for array in (layer.keys, layer.values))
        return feed._advance(*arguments)

    feed._forward = forward
    assert len(feed_all(feed, [fed], 512)) == 3
    assert set(held) == {None}
    check(model, fed)


@given(length=st.integers(2, 20_000), remaining=st.integers(1, 4096), budget=st.integers(16, 4096))
@example(length=4600, remaining=1025, budget=4096)
def test_no_chunk_needs_a_longer_place_than_is_held(feed, length, remaining, budget):
    fed = PendingPrompt([Sequence(0, tuple(range(length)), Sampling(), 10)], 0.0, done=max(0, length - 1 - remaining))
    assert feed._span(fed, feed.choose([fed], budget).length) <= feed.tokens_for(fed)


def test_what_is_held_for_a_prompt_is_told(model):
    feed = placed(model)
    for length in (100, 511, 512, 1000, 3000):
        fed = prompt(model, length)
        feed_all(feed, [fed], 700)
        assert fed.cache[0].keys.shape[2] <= feed.tokens_for(fed)


STATEFUL = ["mamba", "nemotron_h", "jamba", "rwkv7", "olmo_hybrid", "baichuan_m1"]


@pytest.mark.parametrize("name", STATEFUL)
def test_prompts_read_together_say_what_they_say_alone_where_layers_keep_a_state(name):
    """These models of mlx-lm let a chunk's padding into their states."""
    model = random_model(name)
    prompts = [prompt(model, length, seed=n) for n, length in enumerate((7, 45, 7, 100, 45))]
    chunks = feed_all(PlainPrefill(model), prompts, 4096)
    assert chunks == [(2, 6), (2, 44), (1, 99)]
    for each in prompts:
        logits = model(mx.array([each.tokens[-1:]]), cache=each.cache)[0, -1]
        alone = model(mx.array([each.tokens]), cache=caches.new_cache(model))[0, -1]
        assert mx.allclose(logits, alone, atol=1e-3), float(mx.abs(logits - alone).max())


def test_whether_a_model_keeps_a_state_is_known_from_its_cache():
    assert {name for name in CONFIGS if caches.keeps_state(random_model(name))} == set(STATEFUL)


@pytest.mark.parametrize("name", ["llama", "kimi_k25", "llama4"])
def test_attention_heads_are_found_in_nested_arguments(name):
    model = random_model(name)
    assert attention_heads(vars(model.args)) == 4
    assert PlainPrefill(model).choose([prompt(model, 20)], 64).length == 19
