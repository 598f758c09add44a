"""Attention of prompts in few shapes: what is computed stays the same, and shapes recur from turn to turn."""

from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm.models import base

from mlxserver.engine.kv_cache import attention_shapes, ragged
from mlxserver.engine.kv_cache.attention_shapes import few_lengths
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import random_model
from tests.support.batch_driver import Driver, prompt, sequence

FEW_SHAPES = replace(CPU, bucket_attention=True)
TURNS = 20


@pytest.fixture
def shapes(monkeypatch):
    """Shapes of queries and keys of every attention of more than one token."""
    ragged.bind()
    found = set()
    plain = ragged._attention

    def attend(queries, keys, values, **others):
        if queries.shape[2] > 1:
            found.add((queries.shape, keys.shape, values.shape))
        return plain(queries, keys, values, **others)

    monkeypatch.setattr(ragged, "_attention", attend)
    return found


def session(model, policy):
    """The answers of turns that grow by other numbers of tokens, and how many tokens came from the cache."""
    prefixes = PrefixCache(RamTier()).open(ModelIdentity("files"), 1 << 30, "model")
    prefixes.is_warm = True
    driver = Driver(Scheduler(model, prefixes=prefixes, policy=policy))
    tokens, answers, cached = prompt(200, seed=1), [], 0
    for turn in range(TURNS):
        tokens += prompt(21 + turn, seed=2 + turn)
        driver.add(replace(sequence(turn, tokens), boundaries=(200, len(tokens) - 3)))
        answers.append(tuple(driver.finish()[turn]))
        cached += driver.cached[turn]
        tokens += answers[-1]
    return answers, cached


@pytest.mark.parametrize("name", ["gemma3_text", "olmo_hybrid"])
def test_a_session_has_few_shapes_and_the_same_answers(name, shapes):
    model = random_model(name)
    expected = session(model, CPU)
    many = len(shapes)
    shapes.clear()
    assert session(model, FEW_SHAPES) == expected
    assert many > 2 * TURNS
    assert len(shapes) <= 12


@pytest.mark.parametrize("tokens, keys", [(5, 5), (40, 300), (32, 256), (33, 700)])
@pytest.mark.parametrize("kind", ["causal", "none", "bool", "added", "rows", "batch"])
def test_attention_is_what_it_is_without_padding(kind, tokens, keys):
    queries = mx.random.normal((2, 4, tokens, 16), key=mx.random.key(0))
    own, values = (mx.random.normal((2, 2, keys, 16), key=mx.random.key(n)) for n in (1, 2))
    window = mx.arange(keys) > mx.arange(keys - tokens, keys)[:, None] - 7
    window = window & (mx.arange(keys) <= mx.arange(keys - tokens, keys)[:, None])
    mask = {
        "causal": "causal",
        "none": None,
        "bool": window,
        "added": mx.where(window, 0.0, -1e9),
        "rows": mx.arange(keys)[None] > 2,
        "batch": mx.stack([window, window | (mx.arange(keys) < 2)])[:, None],
    }[kind]
    arguments = (queries, own, values, None, 0.25, mask)
    expected = base.scaled_dot_product_attention(*arguments)
    with attention_shapes.padded():
        got = [ragged.attention(*arguments) for _ in range(2)]
    assert all(mx.allclose(each, expected, atol=1e-5) for each in got)
    assert all(mx.array_equal(ragged.attention(*arguments), expected) for _ in range(2))


@pytest.mark.parametrize("tokens, dim", [(1, 16), (40, 256)])
def test_what_needs_no_plan_is_not_padded(tokens, dim, shapes):
    queries, keys = (mx.zeros((1, 2, count, dim)) for count in (tokens, 50))
    mask = mx.ones((tokens, 50), dtype=mx.bool_)
    with attention_shapes.padded():
        assert ragged.attention(queries, keys, keys, None, 1.0, mask).shape == queries.shape
    assert shapes <= {(queries.shape, keys.shape, keys.shape)}


def test_lengths_are_few_and_less_than_half_as_long_again():
    lengths = {few_lengths(length, 256) for length in range(1, 40_000)}
    assert len(lengths) == 16
    assert all(length <= few_lengths(length, 256) < 1.5 * length + 1 for length in range(257, 40_000))
