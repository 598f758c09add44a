"""Products in pieces give what whole ones give."""

from mlxserver.engine.mlx import mx

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
def test_a_product_in_pieces_is_that_of_mlx(shape):
    weight, x = mx.random.normal((1536, 576)) / 24, mx.random.normal((*shape, 576), key=mx.random.key(1))
    product = cpu_matmul.in_pieces(x, weight)
    assert (product is None) == (not 0 < x.size // 576 <= MOST_ROWS)
    assert product is None or product.shape == (*shape, 1536)
    assert product is None or close(product, x @ weight.T)


def test_other_types_are_left_to_mlx():
    assert cpu_matmul.in_pieces(mx.ones((1, 576), mx.float16), mx.ones((1536, 576), mx.float16)) is None


@given(st.integers(1, MOST_ROWS), st.integers(1, 200_000), st.integers(1, 20_000))
def test_a_piece_is_small_enough_and_divides_the_outputs(rows, outputs, inputs):
    if size := piece(rows, outputs, inputs):
        assert outputs % size == 0
        assert size * rows <= MOST_OUTPUTS
        assert size * rows * inputs <= MOST_WORK


def test_what_is_small_or_cannot_be_cut_stays_whole():
    assert piece(1, 192, 576) is None
    assert piece(1, 49_157, 576) is None  # a prime
