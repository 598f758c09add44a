"""CPU kernels give what MLX's functions give."""

from concurrent.futures import ThreadPoolExecutor

from mlxserver.engine.mlx import mx, nn

import numpy as np
import pytest

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


@pytest.mark.parametrize("name", ["gelu", "gelu_approx", "gelu_fast_approx", "silu"])
def test_activations_are_those_of_mlx(name):
    ours, theirs = getattr(cpu_kernels, name), getattr(nn, name)
    x = mx.concatenate([mx.linspace(-40.0, 40.0, 4001), mx.zeros((100,)), mx.array([float("inf")])])
    few = mx.array([-1.0, 0.0, 2.0])
    for own in (x, few):
        np.testing.assert_allclose(ours(own), theirs(own), atol=1e-6)
    half = x.astype(mx.bfloat16)
    assert mx.array_equal(ours(half), theirs(half), equal_nan=True)


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
