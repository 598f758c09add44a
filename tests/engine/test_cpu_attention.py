"""Attention on a CPU gives what MLX's gives, as a whole and layer by layer."""

from mlxserver.engine.mlx import mx

import numpy as np
import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import loader
from mlxserver.engine.platform import cpu_attention, device

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="it is for CPUs")


def masks(length, total):
    causal = mx.arange(total - length, total)[:, None] >= mx.arange(total)[None]
    yield from (None, "causal", causal, causal[None, None], mx.where(causal, 0.0, -1e9))
    yield mx.concatenate([causal[None, None], causal[None, None] & (mx.arange(total) > 0)])


@pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 40), (8, 8), (8, 40), (1, 2304), (90, 90), (90, 200)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3)])
def test_attention_is_that_of_mlx(length, total, heads):
    queries, groups = heads
    keys = mx.random.split(mx.random.key(0), 3)
    q = mx.random.normal((2, length, queries, 16), key=keys[0]).transpose(0, 2, 1, 3)
    k = mx.random.normal((2, groups, total, 16), key=keys[1])
    v = mx.random.normal((2, groups, total, 16), key=keys[2])
    for mask in masks(length, total):
        ours = cpu_attention.attention(q, k, v, scale=0.25, mask=mask)
        theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask)
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6, err_msg=str(mask))
        assert ours.shape == q.shape


def test_layer_by_layer_a_model_gives_the_same_logits(tiny_llama_path):
    model, tokens = loader.load(ModelSpec("tiny", str(tiny_llama_path))).model, mx.array([[1, 2, 3, 4, 5]])
    expected = model(tokens)
    with cpu_attention.layer_by_layer(True):
        assert mx.array_equal(model(tokens), expected)
    assert not cpu_attention._thread.is_stepwise


@pytest.mark.parametrize(
    "shape", [(5, 2, 2, 400, 400), (1, 4, 2, 600, 650), (1, 1, 1, 1100, 1100), (3, 2, 1, 700, 700)]
)
@pytest.mark.parametrize("mask", ["none", "causal", "of rows", "of heads", "of tokens", "additive"])
@pytest.mark.parametrize("dim", [8, 800])  # of which the native kernels, where they are built, know the first
def test_scores_in_pieces_give_the_same_attention(shape, mask, dim):
    batch, heads, groups, length, total = shape
    q = mx.random.normal((batch, heads, length, dim))
    k, v = mx.random.normal((batch, groups, total, dim)), mx.random.normal((batch, groups, total, 8))
    masks = {
        "none": None,
        "causal": "causal",
        "of rows": mx.random.uniform(shape=(batch, 1, 1, total)) > 0.5,
        "of heads": mx.random.uniform(shape=(batch, heads, length, total)) > 0.5,
        "of tokens": mx.random.uniform(shape=(length, total)) > 0.5,
        "additive": mx.random.normal((batch, 1, length, total)),
    }
    with cpu_attention.layer_by_layer(True):
        ours = cpu_attention.attention(q, k, v, scale=0.1, mask=masks[mask])
    theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=masks[mask])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_in_a_function_that_is_compiled_no_layer_is_computed_first():
    q, k, v = (mx.random.normal((1, 2, 800, 8)) for _ in range(3))
    compiled = mx.compile(lambda q, k, v: cpu_attention.attention(q, k, v, scale=0.3))
    with cpu_attention.layer_by_layer(True):
        ours = compiled(q, k, v)
    np.testing.assert_allclose(ours, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3), atol=2e-5)


def test_layer_by_layer_ends_with_an_error():
    with pytest.raises(RuntimeError), cpu_attention.layer_by_layer(True):
        raise RuntimeError
    assert not cpu_attention._thread.is_stepwise
