"""The functions that stand in for MLX's on a CPU say the same."""

import engine  # noqa: F401  (first: it prepares the process for MLX)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from engine import cpu_math, device

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="they are for CPUs")


def close(ours, theirs):
    return np.allclose(np.array(ours), np.array(theirs), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1000.0])
def test_softmax_is_that_of_mlx(scale):
    scores = mx.random.normal((3, 5, 700), key=mx.random.key(1)) * scale
    assert close(cpu_math.softmax(scores, axis=-1), cpu_math._mx_softmax(scores, axis=-1))


def test_softmax_of_what_is_masked_is_zero():
    scores = mx.array([[0.0, -mx.inf, 1.0, -mx.inf]])
    assert close(cpu_math.softmax(scores, axis=-1), cpu_math._mx_softmax(scores, axis=-1))


def test_softmax_of_other_types_and_axes_is_left_to_mlx():
    scores = mx.random.normal((4, 6)).astype(mx.float16)
    assert cpu_math.softmax(scores, axis=-1).dtype == mx.float16
    assert close(cpu_math.softmax(mx.ones((4, 2)), axis=0), mx.full((4, 2), 0.25))


@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_swiglu_is_that_of_mlx_lm(scale):
    gate, x = mx.random.normal((2, 7, 33)) * scale, mx.random.normal((2, 7, 33))
    assert close(cpu_math.swiglu(gate, x), cpu_math._mlx_lm_swiglu(gate, x))


def masks(length, total):
    causal = mx.arange(total - length, total)[:, None] >= mx.arange(total)[None]
    yield from (None, "causal", causal, causal[None, None], mx.where(causal, 0.0, -1e9))
    yield mx.concatenate([causal[None, None], causal[None, None] & (mx.arange(total) > 0)])


@pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 40), (8, 8), (8, 40)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3)])
def test_attention_is_that_of_mlx(length, total, heads):
    queries, groups = heads
    keys = mx.random.split(mx.random.key(0), 3)
    q = mx.random.normal((2, length, queries, 16), key=keys[0]).transpose(0, 2, 1, 3)
    k = mx.random.normal((2, groups, total, 16), key=keys[1])
    v = mx.random.normal((2, groups, total, 16), key=keys[2])
    for mask in masks(length, total):
        ours = cpu_math.attention(q, k, v, scale=0.25, mask=mask)
        assert close(ours, cpu_math._mx_attention(q, k, v, scale=0.25, mask=mask)), mask
        assert ours.shape == q.shape


def test_a_loaded_model_uses_them():
    from mlx_lm.models import llama

    assert llama.swiglu is cpu_math.swiglu
    assert mx.fast.scaled_dot_product_attention is cpu_math.attention
    assert mx.softmax is cpu_math.softmax
