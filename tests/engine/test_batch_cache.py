"""Batched KV caches: each of them computes for a sequence what its own cache does."""

import random

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.batched import make_batch_cache
from mlxserver.engine.kv_cache.merged import MergedCache
from mlxserver.engine.kv_cache.quantized import KVFormat
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.loading.kv_format import quantize_kv
from mlxserver.engine.platform.policy import CUDA
from tests.support.architectures import random_model

pytestmark = pytest.mark.usefixtures("without_compilation")


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def padded(model):
    """Slots as a GPU has them: in powers of two, of shapes that recur, and filled together."""
    return SlotCache(model, CUDA)


KINDS = pytest.mark.parametrize("make", [SlotCache, padded, MergedCache], ids=["slots", "padded", "merged"])


def filled(model, tokens):
    cache = caches.new_cache(model)
    if tokens:
        model(mx.array([tokens]), cache=cache)
    return cache


class Reference:
    """A BatchCache and, beside it, all tokens of each sequence."""

    def __init__(self, model, cache):
        self.model, self.cache, self.tokens = model, cache, []

    def join(self, *prompts):
        self.cache.join([filled(self.model, prompt) for prompt in prompts])
        self.tokens += [list(prompt) for prompt in prompts]

    def keep(self, *order):
        self.cache.keep(order)
        self.tokens = [self.tokens[index] for index in order]

    def advance(self, steps=1):
        for step in range(steps):
            inputs = [(7 * len(tokens) + step) % 300 for tokens in self.tokens]
            logits = self.cache.advance(mx.array(inputs, dtype=mx.uint32))
            for tokens, token in zip(self.tokens, inputs, strict=True):
                tokens.append(token)
        expected = mx.stack([self.model(mx.array([tokens]))[0, -1] for tokens in self.tokens])
        assert logits.shape == expected.shape
        assert mx.allclose(logits, expected, atol=1e-3)


@KINDS
def test_sequences_join_advance_and_leave(model, make):
    batch = Reference(model, make(model))
    batch.join([5, 6, 7], [])
    batch.advance(3)
    batch.join([9] * 40, [], [3, 4])
    batch.advance(2)
    batch.keep(4, 0, 2)
    batch.advance(2)
    batch.keep(1)
    batch.advance()
    batch.join([8] * 300)
    batch.advance(3)


@KINDS
def test_slots_grow_beyond_their_first_capacity(model, make):
    batch = Reference(model, make(model))
    batch.join(list(range(250)), [1])
    batch.advance(20)
    batch.join(list(range(290)))
    batch.advance(3)


@KINDS
def test_many_sequences_come_and_go(model, make):
    batch = Reference(model, make(model))
    for n in range(9):
        batch.join([n] * (n + 1))
        batch.advance()
    while len(batch.tokens) > 1:
        batch.keep(*range(1, len(batch.tokens)))
        batch.advance()


@KINDS
def test_those_that_join_take_the_places_of_those_that_left(model, make):
    batch, dice = Reference(model, make(model)), random.Random(3)
    batch.join(*([n] * (n + 1) for n in range(13)))
    for traffic in range(12):
        staying = sorted(dice.sample(range(len(batch.tokens)), dice.randint(1, len(batch.tokens))))
        batch.keep(*staying)
        if traffic % 5 == 4:
            batch.cache.compact()
        batch.advance()
        batch.join(*([dice.randrange(300)] * dice.randint(1, 40) for _ in range(dice.randint(1, 6))))
        batch.advance()


def test_a_sequence_keeps_its_slot_until_slots_are_given_back(model):
    batch = Reference(model, padded(model))
    batch.join(*([n] * 5 for n in range(8)))
    batch.advance()
    (slot_class,) = batch.cache._classes.values()
    batch.keep(*range(4, 8))
    assert slot_class.holders == [None] * 4 + [0, 1, 2, 3]
    batch.join(*([n] * 5 for n in range(3)))
    assert slot_class.holders == [4, 5, 6, None, 0, 1, 2, 3]
    batch.keep(2, 3)
    assert slot_class.slots == slot_class.slots_for(2) == len(slot_class.holders) == 2
    batch.advance()


@KINDS
def test_an_extracted_cache_is_a_copy(model, make):
    batch = Reference(model, make(model))
    batch.join([5, 6, 7], [1] * 30)
    batch.advance(4)
    cache, tokens = batch.cache.extract(1), list(batch.tokens[1])
    batch.advance(3)
    assert [layer.offset for layer in cache] == [len(tokens)] * len(cache)
    logits = model(mx.array([[11]]), cache=cache)[0, -1]
    assert mx.allclose(logits, model(mx.array([[*tokens, 11]]))[0, -1], atol=1e-3)


@pytest.mark.parametrize("make", [SlotCache, padded], ids=["slots", "padded"])
def test_a_sequence_is_not_reached_by_what_an_overflow_left_in_its_slot(model, make):
    batch = Reference(model, make(model))
    batch.join([5] * 60)
    overflown = filled(model, [6] * 50)
    for layer in overflown:
        layer.keys, layer.values = layer.keys * mx.nan, layer.values * mx.nan
    for prompt in ([7, 8, 9], []):
        batch.cache.join([overflown])
        batch.cache.keep([0])
        batch.join(prompt)
        batch.advance(2)
        batch.keep(0)


def test_a_sequence_is_not_reached_by_values_behind_its_own_end(model):
    batch = Reference(model, SlotCache(model))
    batch.join([5] * 60)
    batch.tokens.append([7, 8, 9])
    trimmed = filled(model, [7, 8, 9])
    for layer in trimmed:
        layer.keys[:, :, 3:], layer.values[:, :, 3:] = mx.nan, mx.nan
    batch.cache.join([trimmed])
    batch.advance(2)


def test_sequences_that_have_to_grow_can_still_give_slots_back(model):
    batch = Reference(model, SlotCache(model))
    batch.join([5] * 255, [6])
    batch.advance()
    batch.keep(0)
    batch.cache.compact()
    assert [slot_class.slots for slot_class in batch.cache._classes.values()] == [1]
    batch.advance(2)


def test_plain_caches_have_slots(model):
    assert isinstance(make_batch_cache(model), SlotCache)


def test_slots_are_made_at_once_for_those_that_are_soon_to_join(model):
    cache = SlotCache(model)
    cache.join([filled(model, [1, 2, 3])], coming=6)
    tokens = cache.tokens_for([4] * 7)
    for _ in range(6):
        cache.join([filled(model, [4, 5])])
    assert cache.tokens_for([4] * 7) == tokens == cache.held_tokens


@pytest.fixture(scope="module", params=[None, KVFormat(8, 64)], ids=["plain", "quantized"])
def stored(request):
    """A model, and how it keeps its keys and values."""
    own = random_model("llama", head_dim=64, hidden_size=256)
    quantize_kv(own, request.param)
    return own


@pytest.mark.parametrize("make", [SlotCache, padded], ids=["slots", "padded"])
@pytest.mark.parametrize("class_of", [None, lambda tokens: 64 << (tokens > 64)], ids=["one class", "two classes"])
def test_several_tokens_at_once_are_computed_as_one_by_one_and_can_be_taken_back(stored, make, class_of):
    """Sequences keep unlike numbers of the tokens, as drafts are accepted, and go on behind them."""
    rows = [[5, 6, 7], [9] * 90, [8], [3] * 40]
    plain, several = make(stored), make(stored)
    for cache in (plain, several):
        if class_of:
            cache._class_of = class_of
        cache.join([filled(stored, tokens) for tokens in rows])
        cache.keep([0, 1, 3])
    expected = []
    for step in range(4):
        expected.append(plain.advance(mx.array([11 + step, 12 + step, 13 + step], dtype=mx.uint32)))
    drafted = mx.array([[11, 12, 70, 71], [12, 13, 14, 15], [13, 14, 15, 99]], dtype=mx.uint32)
    assert several.fits(4)
    logits = several.verify(drafted)
    for row, kept in enumerate([2, 4, 3]):
        for n in range(kept):
            assert mx.allclose(logits[row, n], expected[n][row], atol=2e-3)
    several.rewind([2, 0, 1])
    for step in range(2):
        inputs = [13 + step, 16 + step, 16 + step]
        reference = [[*rows[0], 11, 12, 13, 14], [*rows[1], 12, 13, 14, 15, 16, 17], [*rows[3], 13, 14, 15, 16, 17]]
        got = several.advance(mx.array(inputs, dtype=mx.uint32))
        for row, tokens in enumerate(reference):
            cache = filled(stored, tokens[: len(tokens) - 2 + step])
            assert mx.allclose(got[row], stored(mx.array([[inputs[row]]]), cache=cache)[0, -1], atol=0.02)


@pytest.mark.parametrize("make", [SlotCache, padded], ids=["slots", "padded"])
def test_tokens_that_would_need_a_longer_slot_do_not_fit(model, make):
    cache = make(model)
    cache.join([filled(model, [5] * 250), filled(model, [6] * 3)])
    assert cache.fits(6)
    assert not cache.fits(7)
    cache.verify(mx.zeros((2, 6), dtype=mx.uint32))
    cache.rewind([5, 0])
    assert cache.fits(5)
    assert not cache.fits(6)


@pytest.mark.parametrize("make", [SlotCache, padded], ids=["slots", "padded"])
def test_a_sequence_is_not_reached_by_what_an_overflow_left_where_tokens_were_taken_back(model, make):
    batch = Reference(model, make(model))
    batch.join([5] * 60, [7, 8])
    batch.advance()
    batch.cache.verify(mx.array([[9, 10, 11]] * 2, dtype=mx.uint32))
    for slot_class in batch.cache._classes.values():
        slot_class.keys = [mx.where(mx.arange(slot_class.capacity)[:, None] >= 61, mx.nan, k) for k in slot_class.keys]
        slot_class.values = [
            mx.where(mx.arange(slot_class.capacity)[:, None] >= 61, mx.inf, v) for v in slot_class.values
        ]
    batch.cache.rewind([3, 3], erases=True)
    batch.advance(3)
