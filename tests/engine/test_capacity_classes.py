"""Sequences of very different lengths decode together: each generates what it generates alone, and pays for itself."""

import random
from itertools import pairwise

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load
from mlx_lm.generate import generate_step

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.batched import make_batch_cache
from mlxserver.engine.kv_cache.classes import capacity_for, coarse_capacity_for, narrow_class, wide_classes
from mlxserver.engine.kv_cache.merged import MergedCache
from mlxserver.engine.kv_cache.ragged import can_be_ragged
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.kv_cache.slots import empty_layers
from mlxserver.engine.platform.policy import CPU, CUDA, METAL
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import CONFIGS, random_model
from tests.support.batch_driver import Driver, prompt, sequence

pytestmark = pytest.mark.usefixtures("without_compilation")

POLICIES = pytest.mark.parametrize("policy", [CPU, METAL, CUDA], ids=["cpu", "metal", "cuda"])


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def narrow(tokens):
    """A class per power of two, so that short sequences cross borders."""
    return 1 << (tokens - 1).bit_length()


def batch_caches(model):
    """Every cache that this model may have in a batch, with narrow classes."""
    if not caches.is_plain(model):
        return [MergedCache(model, narrow)]
    return [SlotCache(model, policy, narrow, narrow) for policy in (CPU, METAL, CUDA)] + [MergedCache(model, narrow)]


class Alone:
    """A sequence in a cache of its own."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, list(tokens)
        self.cache = self.filled()

    def filled(self):
        cache = caches.new_cache(self.model)
        self.model(mx.array([self.tokens]), cache=cache)
        return cache

    def advance(self, token):
        self.tokens.append(token)
        return self.model(mx.array([[token]]), cache=self.cache)[0, -1]


def is_same_step(cache, sequences, number):
    tokens = [(7 * number + 11 * n) % 300 for n in range(len(sequences))]
    logits = cache.advance(mx.array(tokens, dtype=mx.uint32))
    expected = mx.stack([own.advance(token) for own, token in zip(sequences, tokens, strict=True)])
    return logits.shape == expected.shape and bool(mx.allclose(logits, expected, atol=2e-3))


# llama4's chunked caches can't be batched
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama4"])
def test_sequences_of_all_lengths_join_grow_and_leave(name):
    model = random_model(name)
    for cache in batch_caches(model):
        sequences = [Alone(model, prompt(length)) for length in (3, 40, 14)]
        cache.join([own.filled() for own in sequences])
        assert all(is_same_step(cache, sequences, n) for n in range(4))
        joining = [Alone(model, prompt(length, seed=1)) for length in (2, 70, 6, 31)]
        cache.join([own.filled() for own in joining], coming=2)
        sequences += joining
        assert all(is_same_step(cache, sequences, n) for n in range(4, 9))
        order = [0, 6, 2, 3, 5]
        cache.keep(order)
        sequences = [sequences[index] for index in order]
        cache.compact()
        assert all(is_same_step(cache, sequences, n) for n in range(9, 12))
        own = Alone(model, sequences[3].tokens)
        own.cache = cache.extract(3)
        assert mx.allclose(own.advance(5), Alone(model, sequences[3].tokens).advance(5), atol=2e-3)
        cache.keep([4])
        assert all(is_same_step(cache, sequences[4:], n) for n in range(12, 18))


def test_one_step_computes_all_classes_where_a_model_leaves_its_keys_alone():
    assert {name for name in CONFIGS if caches.is_plain(model := random_model(name)) and is_ragged(model)} == {"llama"}


def is_ragged(model):
    return can_be_ragged(model, empty_layers(model))


def expected(model, tokens, count):
    steps = generate_step(mx.array(tokens), model, max_tokens=count, sampler=lambda x: mx.argmax(x, axis=-1))
    return [int(token) for token, _ in steps]


@POLICIES
def test_greedy_text_beside_a_long_sequence_is_that_of_mlx_lm_alone(model, policy):
    prompts = [prompt(length, seed=length) for length in (1100, 250, 20, 500, 3, 1018)]
    driver = Driver(
        Scheduler(model, policy=policy), *(sequence(n, own, max_tokens=14) for n, own in enumerate(prompts))
    )
    driver.until_generated(2, 5)
    driver.add(sequence(6, late := prompt(255, seed=9), max_tokens=9))
    driver.until_generated(6, 3)
    driver.scheduler.remove([0])
    gone = len(driver.tokens[0])
    driver.finish()
    for n, own in enumerate([*prompts, late]):
        assert driver.tokens[n] == expected(model, own, len(driver.tokens[n]))
    assert gone < 14


@POLICIES
def test_preempted_sequences_of_different_lengths_generate_the_same(model, policy):
    prompts = [prompt(length, seed=length) for length in (1010, 250, 240, 30)]
    scheduler = Scheduler(model, policy=policy, max_kv_tokens=2400)
    driver = Driver(scheduler, *(sequence(n, own, max_tokens=30) for n, own in enumerate(prompts)))
    driver.finish()
    assert driver.tokens == {n: expected(model, own, 30) for n, own in enumerate(prompts)}


@POLICIES
def test_short_sequences_run_together_beside_a_long_one(model, policy):
    long, short = 1990, [prompt(40 + n, seed=n) for n in range(8)]
    scheduler = Scheduler(model, policy=policy, max_kv_tokens=2048 + 8 * 256 + 2 * 1024)
    driver = Driver(scheduler, sequence(0, prompt(long), max_tokens=40))
    driver.until_generated(0)
    driver.add(*(sequence(1 + n, own, max_tokens=20) for n, own in enumerate(short)))
    driver.until(lambda: scheduler.num_decoding == 9)
    driver.finish()


def test_a_long_sequence_takes_no_more_beside_short_ones(model):
    cache = make_batch_cache(model, CPU)
    assert cache.tokens_for([6000] + [200] * 8) == cache.tokens_for([6000]) + cache.tokens_for([200] * 8)


def test_slots_of_several_classes_have_few_capacities_where_steps_are_compiled(model):
    def shape(policy, *lengths):
        cache = SlotCache(model, policy)
        cache.join([Alone(model, prompt(length)).filled() for length in lengths])
        cache.advance(mx.zeros((len(lengths),), dtype=mx.uint32))
        return cache.shape

    assert shape(CUDA, 300) == shape(METAL, 300) == ((1, 512),)
    assert shape(CUDA, 1030) == shape(METAL, 1030) == ((1, 1536),)
    assert shape(METAL, 300, 1030) == ((1, 512), (1, 1536))
    assert shape(CUDA, 300, 1030) == shape(CUDA, 700, 1030) == ((1, 1024), (1, 2048))
    assert shape(CUDA, 30, 1030) == ((1, 256), (1, 2048))
    assert [coarse_capacity_for(tokens) for tokens in (8193, 20_000)] == [capacity_for(8193), capacity_for(20_000)]


@POLICIES
def test_no_step_takes_more_than_was_claimed_before_it(model, policy):
    """Sequences of all lengths join, grow out of their class, and leave."""
    cache, rng, claims = SlotCache(model, policy), random.Random(5), []
    for number in range(12):
        lengths = [rng.choice((3, 255, 500, 1019, 1022, 1300)) for _ in range(rng.randrange(1, 4))]
        cache.join([filled(model, length) for length in lengths])
        for _ in range(4):
            claims.append(cache.tokens_for([length + 1 for length in cache.lengths]))
            cache.advance(mx.zeros((len(cache.lengths),), dtype=mx.uint32))
            assert cache.held_tokens <= claims[-1], number
        kept = [n for n in range(len(cache.lengths)) if rng.random() < 0.6] or [0]
        cache.keep(kept)
        if rng.random() < 0.5:
            cache.compact()
            assert cache.held_tokens <= cache.tokens_for([length + 1 for length in cache.lengths])


def filled(model, length):
    """A cache of so many tokens."""
    return Alone(model, prompt(length)).filled()


@pytest.mark.parametrize("name", ["kimi_k25", "gemma3_text"])
def test_ranks_make_one_forward_pass_per_step(name):
    calls = []
    model = random_model(name)
    cache = make_batch_cache(Counted(model, calls), is_shared=True)
    cache.join([Alone(model, prompt(length)).cache for length in (3, 2100)])
    calls.clear()
    cache.advance(mx.array([1, 2], dtype=mx.uint32))
    assert len(calls) == 1


class Counted:
    """A model that records its calls."""

    def __init__(self, model, calls):
        self._model, self._calls = model, calls

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *arguments, **options):
        self._calls.append(arguments)
        return self._model(*arguments, **options)


def test_capacity_is_of_few_sizes_and_little_more_than_needed():
    lengths = range(1, 40_000)
    capacities = [capacity_for(tokens) for tokens in lengths]
    for tokens, capacity in zip(lengths, capacities, strict=True):
        assert tokens <= capacity < max(tokens + 256, 1.5 * tokens if tokens <= 4096 else 1.25 * tokens)
    assert all(one <= other for one, other in pairwise(capacities))
    assert len(set(capacities)) < 22
    assert {narrow_class(tokens) for tokens in lengths} == {1024 << n for n in range(7)}


@pytest.mark.parametrize(("pass_tokens", "first", "count"), [(0, 2048, 3), (11_700, 2048, 3), (122_000, 16_384, 2)])
def test_a_pass_per_class_is_made_only_where_padding_costs_more_than_the_weights(pass_tokens, first, count):
    limits = sorted({wide_classes(pass_tokens)(tokens) for tokens in range(1, 40_000)})
    assert (limits[0], len(limits)) == (first, count)


def test_slots_are_given_back_when_their_class_is_left(model):
    cache = SlotCache(model, CPU)
    cache.join([Alone(model, prompt(length)).cache for length in (1020, 1021, 20)])
    for _ in range(8):
        cache.advance(mx.array([1, 2, 3], dtype=mx.uint32))
    assert cache.held_tokens == cache.tokens_for([1028, 1029, 28]) == 2 * 1536 + 1024
    cache.keep([2])
    assert cache.held_tokens == 1024
    cache.compact()
    assert cache.held_tokens == 256
