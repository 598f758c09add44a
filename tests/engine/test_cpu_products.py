"""Products in pieces are those of MLX's layers."""

from mlxserver.engine.mlx import mx

import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.engine.platform import cpu_matmul, device
from mlxserver.engine.platform.cpu_matmul import MOST_OUTPUTS, MOST_ROWS, MOST_WORK, piece

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="they are for CPUs")


def close(ours, theirs):
    return np.allclose(np.array(ours), np.array(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1, 1), (2, 1), (3, 2), (8, 1), (9, 1), (2, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_that_of_mlx(shape, bias):
    layer = nn.Linear(576, 1536, bias=bias)
    x = mx.random.normal((*shape, 576), key=mx.random.key(1))
    ours, theirs = cpu_matmul.linear(layer, x), cpu_matmul._mlx_linear(layer, x)
    assert ours.shape == theirs.shape
    assert close(ours, theirs)


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_an_output_layer_is_that_of_mlx(rows):
    layer = nn.Embedding(49152, 64)
    x = mx.random.normal((rows, 1, 64), key=mx.random.key(1))
    assert close(cpu_matmul.as_linear(layer, x), cpu_matmul._mlx_as_linear(layer, x))


def test_other_types_are_left_to_mlx():
    layer = nn.Linear(576, 1536)
    layer.set_dtype(mx.float16)
    assert cpu_matmul.linear(layer, mx.ones((1, 576), mx.float16)).dtype == mx.float16


@given(st.integers(1, MOST_ROWS), st.integers(1, 200_000), st.integers(1, 20_000))
def test_a_piece_is_small_enough_and_divides_the_outputs(rows, outputs, inputs):
    if size := piece(rows, outputs, inputs):
        assert outputs % size == 0
        assert size * rows <= MOST_OUTPUTS
        assert size * rows * inputs <= MOST_WORK


def test_what_is_small_or_cannot_be_cut_stays_whole():
    assert piece(1, 192, 576) is None
    assert piece(1, 49_157, 576) is None  # a prime
