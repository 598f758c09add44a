"""Chunked prefill: every strategy gives a prompt the KV cache that it has by itself."""

from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm import load

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading.metadata import attention_heads
from mlxserver.engine.platform.policy import CUDA
from mlxserver.engine.scheduler.bucketed_prefill import BucketedPrefill
from mlxserver.engine.scheduler.plain_prefill import PlainPrefill
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.sequence import Sequence
from tests.support.architectures import CONFIGS, random_model


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def bucketed(model):
    """As on a GPU, but not compiled: here that would cost seconds of the C++ compiler."""
    return BucketedPrefill(model, replace(CUDA, compile_steps=False))


@pytest.fixture(scope="module")
def strategy(model):
    return bucketed(model)


STRATEGIES = pytest.mark.parametrize("make", [PlainPrefill, bucketed], ids=["plain", "bucketed"])


def prompt(model, length, seed=0, done=0):
    tokens = tuple((seed + 7 * n) % 300 for n in range(length))
    made = PendingPrompt([Sequence(seed, tokens, SamplingParams(), 10)], 0.0, cache=caches.new_cache(model), done=done)
    if done:
        model(mx.array([tokens[:done]]), cache=made.cache)
    return made


def check(model, prompt):
    """The next token's logits are those of the whole text at once."""
    assert prompt.remaining == 0
    assert [layer.offset for layer in prompt.cache] == [prompt.done] * len(prompt.cache)
    logits = model(mx.array([prompt.tokens[-1:]]), cache=prompt.cache)[0, -1]
    assert mx.allclose(logits, model(mx.array([prompt.tokens]))[0, -1], atol=1e-3)


def prefill(strategy, prompts, budget):
    chunks = []
    while waiting := [prompt for prompt in prompts if prompt.remaining]:
        chunk = strategy.choose(waiting, budget)
        assert chunk.prompts[0] is waiting[0]
        chunks.append((len(chunk.prompts), chunk.length))
        assert strategy.run(chunk).tokens > 0
    return chunks


@STRATEGIES
@pytest.mark.parametrize("budget", [64, 700, 4096])
def test_prompts_of_all_lengths_are_prefilled_whole(model, make, budget):
    lengths = (2, 3, 40, 255, 256, 257, 258, 513, 700)
    prompts = [prompt(model, length, seed=n) for n, length in enumerate(lengths)]
    prefill(make(model), prompts, budget)
    for each in prompts:
        check(model, each)


@STRATEGIES
def test_a_prompt_goes_on_behind_a_cached_prefix(model, make):
    prompts = [prompt(model, 600, done=590), prompt(model, 300, seed=1, done=20), prompt(model, 300, seed=2)]
    prefill(make(model), prompts, 4096)
    for each in prompts:
        check(model, each)


def test_a_prompt_s_end_is_not_left_over(model):
    assert prefill(PlainPrefill(model), [prompt(model, 76)], 64) == [(1, 75)]
    assert prefill(PlainPrefill(model), [prompt(model, 41), prompt(model, 39, seed=1)], 64) == [(2, 40)]
    assert prefill(PlainPrefill(model), [prompt(model, 86)], 64) == [(1, 64), (1, 21)]


def test_bucketed_chunks_have_few_shapes(model):
    prompts = [prompt(model, 240 + n, seed=n) for n in range(15)]
    chunks = prefill(bucketed(model), prompts, 4096)
    assert chunks == [(4, 256)] * 3 + [(2, 256), (1, 256)]
    assert prefill(bucketed(model), [prompt(model, 3000)], 1100) == [(1, 1024), (1, 1024), (1, 1024)]


def test_a_chunk_has_the_only_reference_to_its_slots(model):
    """Only then is it written in place."""
    strategy, long, references = bucketed(model), prompt(model, 1100), []

    def forward(*arguments):
        references.extend(array for layer in long.cache for array in (layer.keys, layer.values))
        return strategy._advance(*arguments)

    strategy._forward = forward
    assert len(prefill(strategy, [long], 512)) == 3
    assert set(references) == {None}
    check(model, long)


@given(length=st.integers(2, 20_000), remaining=st.integers(1, 4096), budget=st.integers(16, 4096))
@example(length=4600, remaining=1025, budget=4096)
def test_no_chunk_needs_more_capacity_than_is_budgeted(strategy, length, remaining, budget):
    long = PendingPrompt(
        [Sequence(0, tuple(range(length)), SamplingParams(), 10)], 0.0, done=max(0, length - 1 - remaining)
    )
    assert strategy._capacity(long, strategy.choose([long], budget).length) <= strategy.tokens_for(len(long.tokens))


def test_a_prompt_takes_no_more_kv_cache_than_is_budgeted(model):
    strategy = bucketed(model)
    for length in (100, 511, 512, 1000, 3000):
        one = prompt(model, length)
        prefill(strategy, [one], 700)
        assert one.cache[0].keys.shape[2] <= strategy.tokens_for(len(one.tokens))


STATEFUL = ["mamba", "nemotron_h", "jamba", "rwkv7", "olmo_hybrid", "baichuan_m1"]


@pytest.mark.parametrize("name", STATEFUL)
def test_prompts_prefilled_together_are_the_same_alone_where_layers_keep_a_state(name):
    """These models of mlx-lm let a chunk's padding into their states."""
    model = random_model(name)
    prompts = [prompt(model, length, seed=n) for n, length in enumerate((7, 45, 7, 100, 45))]
    chunks = prefill(PlainPrefill(model), prompts, 4096)
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
