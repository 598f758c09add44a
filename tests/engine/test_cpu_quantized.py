"""Products with quantized weights are those with dequantized float32 weights, to rounding."""

from mlxserver.engine.mlx import mx, nn

import pytest

from mlxserver.engine.platform import cpu_quantized

needs_kernels = pytest.mark.skipif(cpu_quantized.native() is None, reason="the native kernels are not built")


def quantized(outputs, inputs, group, bits, dtype=mx.float16):
    words, scales, biases = mx.quantize(mx.random.normal((outputs, inputs)), group_size=group, bits=bits)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    wide = (words, scales.astype(mx.float32), biases.astype(mx.float32))
    return (words, scales, biases), mx.dequantize(*wide, group_size=group, bits=bits)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_products_of_every_instruction_set_are_exact_to_rounding(bits, group, dtype):
    native = cpu_quantized.native()
    for inputs in (group, 1152):
        parts, weight = quantized(37, inputs, group, bits, dtype)
        for rows in (1, 2, 3, 4, 5, 16, 32, 33, 50):
            x = mx.random.normal((rows, inputs))
            for level in native.levels():
                product = native.product(x, *parts, group, bits, level)
                assert mx.allclose(product, x @ weight.T, rtol=1e-5, atol=2e-4), (rows, inputs, level)


@needs_kernels
def test_inputs_may_have_any_strides_and_leading_dimensions():
    parts, weight = quantized(9, 64, 32, 4)
    x = mx.random.normal((3, 64, 2, 5)).transpose(3, 0, 2, 1)
    assert mx.allclose(cpu_quantized.native().product(x, *parts, 32, 4), x @ weight.T, rtol=1e-5, atol=2e-5)


@needs_kernels
def test_shapes_that_do_not_fit_are_refused():
    parts, _ = quantized(9, 64, 32, 4)
    with pytest.raises(ValueError, match="do not fit"):
        cpu_quantized.native().product(mx.zeros((1, 96)), *parts, 32, 4)


@needs_kernels
def test_replaced_layers_compute_as_the_dequantized_ones():
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 32))
    nn.quantize(model, group_size=32, bits=4)
    tokens = mx.array([[1, 2, 3]])
    expected = model(tokens)
    cpu_quantized.replace_layers(model)
    assert [type(layer) for layer in model.layers] == [cpu_quantized.QuantizedEmbedding, cpu_quantized.QuantizedLinear]
    assert mx.allclose(model(tokens), expected, rtol=1e-4, atol=1e-5)
