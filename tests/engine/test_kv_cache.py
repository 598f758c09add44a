"""KV caches of sequences: into a batch and back, and into the prefix cache and back."""

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load
from mlx_lm.models.cache import KVCache

from mlxserver.engine.kv_cache import caches
from tests.support.prefixes import new_prefixes


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def filled(model, tokens):
    """A cache that holds these tokens."""
    cache = caches.new_cache(model)
    if tokens:
        model(mx.array([list(tokens)]), cache=cache)
    return cache


def is_same(one, other):
    def held(layer):
        return mx.concatenate([layer.keys[..., : layer.offset, :], layer.values[..., : layer.offset, :]])

    return all(
        a.offset == b.offset and mx.allclose(held(a), held(b), atol=1e-5) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("lengths", [(3,), (5, 9), (300, 1, 20)])
def test_a_kv_cache_comes_out_of_a_batch_as_it_went_in(model, lengths):
    own = [filled(model, range(length)) for length in lengths]
    merged = caches.merge(own)
    assert all(is_same(caches.extract(merged, index), cache) for index, cache in enumerate(own))
    assert caches.cache_bytes(merged) == sum(layer.nbytes for layer in merged) > 0


def test_a_cache_that_can_not_be_batched_is_refused():
    with pytest.raises(NotImplementedError, match="can't be batched"):
        caches.merge([[object()]])


def test_what_is_fetched_is_a_copy(model):
    prefixes, tokens = new_prefixes(), list(range(40))
    prefixes.store(tokens, filled(model, tokens))
    first, length = prefixes.fetch([*tokens, 50])
    assert length == 40
    model(mx.array([[50, 51]]), cache=first)
    again, length = prefixes.fetch([*tokens, 60])
    assert (length, again[0].offset) == (40, 40)
    assert is_same(again, filled(model, tokens))


@pytest.mark.parametrize(
    ("asked", "length"),
    [
        (list(range(40)), 39),  # a token is left to feed
        (list(range(30)), 29),
        ([*range(20), 99, 98], 20),
        (list(range(60)), 40),
        (list(range(17)), 16),
        (list(range(16)), 0),  # 15 tokens would be reused: too few
        ([99, *range(40)], 0),
        ([0], 0),
    ],
)
def test_a_fetch_returns_the_longest_common_prefix_but_leaves_a_token_to_feed(model, asked, length):
    prefixes = new_prefixes()
    prefixes.store(range(40), filled(model, range(40)))
    cache, found = prefixes.fetch(asked)
    assert found == length
    assert cache is None if length == 0 else is_same(cache, filled(model, asked[:length]))


def test_a_prefix_that_is_too_short_is_not_stored(model):
    prefixes = new_prefixes()
    prefixes.store(range(15), filled(model, range(15)))
    assert prefixes.nbytes == 0


def test_the_least_recently_stored_goes_first(model):
    prefixes = new_prefixes()
    for start in (0, 100, 200):
        prefixes.store(range(start, start + 32), filled(model, range(start, start + 32)))
    size = prefixes.nbytes // 3
    prefixes.shrink(2 * size)
    assert prefixes.nbytes == 2 * size
    assert [prefixes.fetch(list(range(start, start + 33)))[1] for start in (0, 100, 200)] == [0, 32, 32]


def test_no_more_than_the_bytes_allowed_are_stored(model):
    one = filled(model, range(32))
    prefixes = new_prefixes(caches.cache_bytes(one) - 1)
    prefixes.store(range(32), one)
    assert prefixes.nbytes == 0
    assert isinstance(caches.new_cache(model)[0], KVCache)
