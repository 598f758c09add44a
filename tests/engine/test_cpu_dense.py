"""Native products with weights that are not quantized are MLX's of float32 weights, to rounding."""

from concurrent.futures import ThreadPoolExecutor

from mlxserver.engine.mlx import mx, nn

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxserver.engine.platform import cpu_layers, cpu_matmul
from mlxserver.engine.platform.native.extension import native

pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels are not built")
TYPES = [mx.float32, mx.float16, mx.bfloat16]


def random(*shape):
    return mx.random.normal(shape)


def address(array):
    mx.eval(array)
    return np.array(array, copy=False).__array_interface__["data"][0]


def assert_close(product, x, weight, bias=None):
    exact = np.array(x, np.float64) @ np.array(weight.astype(mx.float32), np.float64).T
    exact = exact if bias is None else exact + np.array(bias, np.float64)
    assert (product.dtype, product.shape) == (mx.float32, exact.shape)
    np.testing.assert_allclose(np.array(product), exact, rtol=1e-5, atol=1e-5 * max(1, x.shape[-1]) ** 0.5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (37, 64), (131, 1153), (4, 2500), (66, 2048)])
def test_products_of_every_instruction_set_are_exact_to_rounding(outputs, inputs, dtype):
    weight, bias, x = random(outputs, inputs).astype(dtype), random(outputs), random(130, inputs)
    for level in native().levels():
        for rows in (*range(1, 14), 16, 33, 40, 63, 64, 65, 130):
            assert_close(native().dense(x[:rows], weight, level=level), x[:rows], weight)
        assert_close(native().dense(x[:5], weight, bias, level), x[:5], weight, bias)


def test_16_bit_weights_are_widened_exactly():
    for dtype in (mx.float16, mx.bfloat16):
        bits = mx.arange(1 << 16).astype(mx.uint16)
        numbers = bits.view(dtype).astype(mx.float32)
        finite = numbers[mx.array(np.flatnonzero(np.isfinite(np.array(numbers))).astype(np.uint32))]
        for level in native().levels():
            product = native().dense(mx.ones((1, 1)), finite.astype(dtype)[:, None], level=level)
            assert mx.array_equal(product[0], finite)
            weight = mx.pad(finite.astype(dtype)[:, None], ((0, 0), (0, 15)))
            for rows in (1, 9):
                product = native().dense(mx.ones((rows, 16)), weight, level=level)
                assert mx.array_equal(product, mx.broadcast_to(finite, product.shape))


@pytest.mark.parametrize("dtype", TYPES)
def test_inputs_may_have_any_strides_and_leading_dimensions(dtype):
    weight, x = random(9, 64).astype(dtype), random(3, 64, 2, 5).transpose(3, 0, 2, 1)
    for rows in (x, x[1:3, ::2], x[0, 0, 0]):
        assert_close(native().dense(rows, weight), rows, weight)


def test_weights_may_have_any_strides():
    weight, x = random(64, 18), random(5, 64)
    assert_close(native().dense(x, weight.T), x, weight.T)
    assert_close(native().dense(x[:, :18], weight[3:41:2]), x[:, :18], weight[3:41:2])


@pytest.mark.parametrize("dtype", TYPES)
def test_products_of_more_rows_than_are_in_columns_at_once_are_exact_to_rounding(dtype):
    weight, x = random(50, 1800).astype(dtype), random(300, 1800)
    for level in native().levels():
        for rows in (144, 145, 150, 288, 300):
            assert_close(native().dense(x[:rows], weight, level=level), x[:rows], weight)


def test_matrices_of_layers_begin_with_a_line_of_the_caches():
    model = nn.Sequential(nn.Linear(96, 7), nn.Linear(16, 33), nn.LayerNorm(33), nn.Linear(3, 5))
    model.layers[0].weight = model.layers[0].weight.astype(mx.float16)
    expected = [array for _, array in tree_flatten(model)]
    cpu_layers.replace_layers(model)
    for (_, array), before in zip(tree_flatten(model), expected, strict=True):
        assert array.dtype == before.dtype
        assert mx.array_equal(array, before)
    assert [address(model.layers[n].weight) % cpu_layers.LINE for n in (0, 1)] == [0, 0]


def test_one_matrix_of_two_layers_stays_one():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model.layers[1].weight = model.layers[0].weight
    cpu_layers.replace_layers(model)
    assert model.layers[0].weight is model.layers[1].weight


def test_arrays_of_any_strides_and_sizes_can_be_aligned():
    for x in (random(3, 5).T, random(1), mx.zeros((0, 4)), random(4, 16)[1:, ::2], mx.arange(7), mx.array(2.0)):
        assert mx.array_equal(native().aligned(x), x)
    assert address(native().aligned(random(3, 5).T)) % cpu_layers.LINE == 0


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows_have_no_products(shape):
    assert native().dense(mx.zeros(shape), random(9, 64)).shape == (*shape[:-1], 9)


@pytest.mark.parametrize(("x", "weight"), [((1, 96), (9, 64)), ((1, 64), (9, 64, 1)), ((1, 0), (9, 0))])
def test_shapes_that_do_not_fit_are_refused(x, weight):
    with pytest.raises(ValueError, match="do not fit"):
        native().dense(mx.zeros(x), mx.zeros(weight))


def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        native().dense(mx.zeros((1, 64)), mx.zeros((9, 64)), mx.zeros(8))


def test_weights_of_other_types_are_refused():
    with pytest.raises(ValueError, match="this type"):
        native().dense(mx.zeros((1, 64)), mx.zeros((9, 64), mx.int32))


def test_products_of_several_threads_at_once_are_exact_to_rounding():
    weight, x = random(513, 320), random(23, 320)
    exact = x @ weight.T
    mx.eval(weight, x, exact)

    def compute(_):
        with mx.stream(mx.cpu):
            return all(mx.allclose(native().dense(x, weight), exact, rtol=1e-5, atol=1e-4).item() for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(4)))


def test_layers_compute_with_them():
    layer, x = nn.Linear(96, 50), random(2, 3, 96)
    expected = layer(x)
    layer.__class__ = cpu_layers.Linear
    assert mx.array_equal(layer(x), cpu_matmul.product(x, layer.weight, layer.bias))
    assert mx.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_inputs_of_other_types_are_left_to_mlx():
    assert cpu_matmul.product(mx.ones((1, 576), mx.float16), mx.ones((1536, 576), mx.float16)) is None
