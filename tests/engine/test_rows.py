"""DecodeBatch rows: every way of holding their keys and values says what a row says by itself."""

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.batched import MergedCache, SlotCache, make_batch_cache
from mlxserver.engine.platform.policy import CUDA


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def padded(model):
    """Placed rows as a GPU has them: places in powers of two, shapes that stay, and rows that are placed together."""
    return SlotCache(model, CUDA)


@pytest.fixture(autouse=True)
def without_compilation():
    """Compiled functions run as they are written: their shapes would cost seconds of the C++ compiler each."""
    mx.disable_compile()
    yield
    mx.enable_compile()


KINDS = pytest.mark.parametrize("make", [SlotCache, padded, MergedCache], ids=["placed", "padded", "merged"])


def filled(model, tokens):
    cache = caches.new_cache(model)
    if tokens:
        model(mx.array([tokens]), cache=cache)
    return cache


class Lines:
    """BatchCache and, beside them, all the tokens of each: the reference."""

    def __init__(self, model, rows):
        self.model, self.rows, self.tokens = model, rows, []

    def join(self, *prompts):
        self.rows.join([filled(self.model, prompt) for prompt in prompts])
        self.tokens += [list(prompt) for prompt in prompts]

    def keep(self, *order):
        self.rows.keep(order)
        self.tokens = [self.tokens[index] for index in order]

    def advance(self, steps=1):
        for step in range(steps):
            inputs = [(7 * len(tokens) + step) % 300 for tokens in self.tokens]
            logits = self.rows.advance(mx.array(inputs, dtype=mx.uint32))
            for tokens, token in zip(self.tokens, inputs, strict=True):
                tokens.append(token)
        expected = mx.stack([self.model(mx.array([tokens]))[0, -1] for tokens in self.tokens])
        assert logits.shape == expected.shape
        assert mx.allclose(logits, expected, atol=1e-3)


@KINDS
def test_rows_join_advance_and_leave(model, make):
    lines = Lines(model, make(model))
    lines.join([5, 6, 7], [])
    lines.advance(3)
    lines.join([9] * 40, [], [3, 4])
    lines.advance(2)
    lines.keep(4, 0, 2)
    lines.advance(2)
    lines.keep(1)
    lines.advance()
    lines.join([8] * 300)
    lines.advance(3)


@KINDS
def test_rows_grow_beyond_their_first_span(model, make):
    lines = Lines(model, make(model))
    lines.join(list(range(250)), [1])
    lines.advance(20)
    lines.join(list(range(290)))
    lines.advance(3)


@KINDS
def test_many_rows_come_and_go(model, make):
    lines = Lines(model, make(model))
    for n in range(9):
        lines.join([n] * (n + 1))
        lines.advance()
    while len(lines.tokens) > 1:
        lines.keep(*range(1, len(lines.tokens)))
        lines.advance()


@KINDS
def test_an_extracted_row_is_a_copy_of_what_it_holds(model, make):
    lines = Lines(model, make(model))
    lines.join([5, 6, 7], [1] * 30)
    lines.advance(4)
    cache, tokens = lines.rows.extract(1), list(lines.tokens[1])
    lines.advance(3)
    assert [layer.offset for layer in cache] == [len(tokens)] * len(cache)
    logits = model(mx.array([[11]]), cache=cache)[0, -1]
    assert mx.allclose(logits, model(mx.array([[*tokens, 11]]))[0, -1], atol=1e-3)


@pytest.mark.parametrize("make", [SlotCache, padded], ids=["placed", "padded"])
def test_a_row_is_not_reached_by_what_an_overflow_left_in_its_place(model, make):
    lines = Lines(model, make(model))
    lines.join([5] * 60)
    overflown = filled(model, [6] * 50)
    for layer in overflown:
        layer.keys, layer.values = layer.keys * mx.nan, layer.values * mx.nan
    for prompt in ([7, 8, 9], []):
        lines.rows.join([overflown])
        lines.rows.keep([0])
        lines.join(prompt)
        lines.advance(2)
        lines.keep(0)


def test_a_row_is_not_reached_by_what_lies_behind_its_own_end(model):
    lines = Lines(model, SlotCache(model))
    lines.join([5] * 60)
    lines.tokens.append([7, 8, 9])
    trimmed = filled(model, [7, 8, 9])
    for layer in trimmed:
        layer.keys[:, :, 3:], layer.values[:, :, 3:] = mx.nan, mx.nan
    lines.rows.join([trimmed])
    lines.advance(2)


def test_rows_that_have_to_grow_can_still_give_places_back(model):
    lines = Lines(model, SlotCache(model))
    lines.join([5] * 255, [6])
    lines.advance()
    lines.keep(0)
    lines.rows.compact()
    assert lines.rows._keys[0].shape[0] == 1
    lines.advance(2)


def test_plain_caches_have_places(model):
    assert isinstance(make_batch_cache(model), SlotCache)


def test_places_are_made_at_once_for_those_who_are_soon_to_join(model):
    rows = SlotCache(model)
    rows.join([filled(model, [1, 2, 3])], coming=6)
    held = rows.tokens_for(7, 4)
    for _ in range(6):
        rows.join([filled(model, [4, 5])])
    assert rows.tokens_for(7, 4) == held == rows._keys[0].shape[0] * rows._keys[0].shape[2]
