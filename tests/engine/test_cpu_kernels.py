"""CPU kernels give what MLX's functions give."""

from concurrent.futures import ThreadPoolExecutor

from mlxserver.engine.mlx import mx, nn

import numpy as np
import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import loader
from mlxserver.engine.platform import cpu_kernels, device

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="they are for CPUs")


def close(ours, theirs):
    return np.allclose(np.array(ours), np.array(theirs), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1000.0])
def test_softmax_is_that_of_mlx(scale):
    scores = mx.random.normal((3, 5, 700), key=mx.random.key(1)) * scale
    assert close(cpu_kernels.softmax(scores, axis=-1), mx.softmax(scores, axis=-1))


def test_softmax_of_what_is_masked_is_zero():
    scores = mx.array([[0.0, -mx.inf, 1.0, -mx.inf]])
    assert close(cpu_kernels.softmax(scores, axis=-1), mx.softmax(scores, axis=-1))


def test_softmax_of_other_types_and_axes_is_left_to_mlx():
    scores = mx.random.normal((4, 6)).astype(mx.float16)
    assert cpu_kernels.softmax(scores, axis=-1).dtype == mx.float16
    assert close(cpu_kernels.softmax(mx.ones((4, 2)), axis=0), mx.full((4, 2), 0.25))


@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_swiglu_is_that_of_mlx_lm(scale):
    gate, x = mx.random.normal((2, 7, 33)) * scale, mx.random.normal((2, 7, 33))
    assert close(cpu_kernels.swiglu(gate, x), cpu_kernels.mlx_lm_swiglu(gate, x))


def masks(length, total):
    causal = mx.arange(total - length, total)[:, None] >= mx.arange(total)[None]
    yield from (None, "causal", causal, causal[None, None], mx.where(causal, 0.0, -1e9))
    yield mx.concatenate([causal[None, None], causal[None, None] & (mx.arange(total) > 0)])


@pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 40), (8, 8), (8, 40), (20, 20), (1, 2304)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3)])
def test_attention_is_that_of_mlx(length, total, heads):
    queries, groups = heads
    keys = mx.random.split(mx.random.key(0), 3)
    q = mx.random.normal((2, length, queries, 16), key=keys[0]).transpose(0, 2, 1, 3)
    k = mx.random.normal((2, groups, total, 16), key=keys[1])
    v = mx.random.normal((2, groups, total, 16), key=keys[2])
    for mask in masks(length, total):
        ours = cpu_kernels.attention(q, k, v, scale=0.25, mask=mask)
        assert close(ours, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask)), mask
        assert ours.shape == q.shape


def test_gelu_is_that_of_mlx():
    x = mx.concatenate([mx.linspace(-40.0, 40.0, 4001), mx.zeros((100,)), mx.array([float("inf")])])
    np.testing.assert_allclose(cpu_kernels.gelu(x), nn.gelu(x), atol=1e-6)
    few = mx.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(cpu_kernels.gelu(few), nn.gelu(few), atol=1e-6)
    half = x.astype(mx.bfloat16)
    assert mx.array_equal(cpu_kernels.gelu(half), nn.gelu(half), equal_nan=True)


def test_layer_by_layer_a_model_gives_the_same_logits(tiny_llama_path):
    model, tokens = loader.load(ModelSpec("tiny", str(tiny_llama_path))).model, mx.array([[1, 2, 3, 4, 5]])
    expected = model(tokens)
    with cpu_kernels.layer_by_layer(True):
        assert mx.array_equal(model(tokens), expected)
    assert not cpu_kernels._thread.is_stepwise


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
    with cpu_kernels.layer_by_layer(True):
        ours = cpu_kernels.attention(q, k, v, scale=0.1, mask=masks[mask])
    theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=masks[mask])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_in_a_function_that_is_compiled_no_layer_is_computed_first():
    q, k, v = (mx.random.normal((1, 2, 800, 8)) for _ in range(3))
    compiled = mx.compile(lambda q, k, v: cpu_kernels.attention(q, k, v, scale=0.3))
    with cpu_kernels.layer_by_layer(True):
        ours = compiled(q, k, v)
    np.testing.assert_allclose(ours, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3), atol=2e-5)


def test_layer_by_layer_ends_with_an_error():
    with pytest.raises(RuntimeError), cpu_kernels.layer_by_layer(True):
        raise RuntimeError
    assert not cpu_kernels._thread.is_stepwise


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 7, 64), (2, 5, 4, 96)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm_is_that_of_mlx(shape, scale):
    x, weight = mx.random.normal(shape) * scale, mx.random.normal(shape[-1:])
    for eps in (1e-5, 1e-6):
        assert close(cpu_kernels.rms_norm(x, weight, eps), mx.fast.rms_norm(x, weight, eps))


def test_rms_norm_without_weight_or_of_other_types_is_left_to_mlx():
    ones = mx.ones((2, 8))
    assert close(cpu_kernels.rms_norm(ones, None, 1e-5), mx.fast.rms_norm(ones, None, 1e-5))
    assert cpu_kernels.rms_norm(mx.ones((2, 8), mx.float16), mx.ones(8, mx.float16), 1e-5).dtype == mx.float16


@pytest.mark.parametrize("traditional", [True, False])
@pytest.mark.parametrize("offset", [0, 1000, mx.array(3), mx.array([7, 0, 4000])])
@pytest.mark.parametrize("length", [1, 6])
def test_rope_is_that_of_mlx(traditional, offset, length):
    a = mx.random.normal((3, length, 4, 32)).transpose(0, 2, 1, 3)
    freqs = 10000.0 ** (mx.arange(16) / 16)
    for kind in ({"base": 10000.0}, {"base": 500.0, "scale": 0.25}, {"base": None, "freqs": freqs}):
        options = {"traditional": traditional, "offset": offset, "scale": 1.0, **kind}
        ours, theirs = cpu_kernels.rope(a, 32, **options), mx.fast.rope(a, 32, **options)
        assert ours.shape == theirs.shape
        # float32 has an angle of some thousands to 2e-4, and which way it is rounded depends on how it was computed.
        assert np.allclose(np.array(ours), np.array(theirs), atol=2e-3 if np.max(np.array(offset)) > 999 else 1e-5)


def test_rope_of_some_dimensions_is_left_to_mlx():
    a = mx.random.normal((1, 2, 3, 32))
    options = {"traditional": False, "base": 10000.0, "scale": 1.0, "offset": 5}
    assert close(cpu_kernels.rope(a, 16, **options), mx.fast.rope(a, 16, **options))


def test_a_new_position_is_not_taken_for_the_last_one():
    a = mx.ones((1, 1, 1, 8))
    options = {"traditional": False, "base": 10000.0, "scale": 1.0}
    for offset in (1, 2, mx.array([1]), mx.array([2]), 1):
        assert close(cpu_kernels.rope(a, 8, offset=offset, **options), mx.fast.rope(a, 8, offset=offset, **options))


def test_threads_have_their_own_last_positions():
    options = {"traditional": False, "base": 10000.0, "scale": 1.0}
    a = mx.ones((1, 1, 1, 8))
    mx.eval(a)

    def turned(offset):
        with mx.stream(mx.new_thread_local_stream(mx.cpu)):
            return [np.array(cpu_kernels.rope(a, 8, offset=offset, **options)) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        for offset, results in enumerate(pool.map(turned, range(4))):
            expected = np.array(mx.fast.rope(a, 8, offset=offset, **options))
            assert all(np.allclose(result, expected, atol=1e-6) for result in results)
