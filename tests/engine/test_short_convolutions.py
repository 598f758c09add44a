"""Short convolutions as sums: the same as MLX's own, for any number of tokens."""

from mlxserver.engine.mlx import mx, nn

import pytest

from mlxserver.engine.platform.short_convolutions import ShortConv1d, replace_convolutions
from tests.support.architectures import random_model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_sums_are_what_the_convolution_is(bias, dtype):
    layer = nn.Conv1d(24, 24, kernel_size=4, groups=24, bias=bias)
    layer.set_dtype(dtype)
    model = nn.Sequential(layer)
    inputs = [mx.random.normal((2, tokens + 3, 24), key=mx.random.key(tokens)).astype(dtype) for tokens in (1, 2, 50)]
    expected = [model(x) for x in inputs]
    replace_convolutions(model)
    assert type(layer) is ShortConv1d
    for x, wanted in zip(inputs, expected, strict=True):
        got = model(x)
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert mx.allclose(got, wanted, atol=1e-5 if dtype == mx.float32 else 3e-2)


@pytest.mark.parametrize("others", [{"groups": 12}, {"padding": 1}, {"stride": 2}, {"dilation": 2}])
def test_other_convolutions_stay(others):
    model = nn.Sequential(nn.Conv1d(24, 24, **{"kernel_size": 4, "groups": 24, **others}))
    replace_convolutions(model)
    assert type(model.layers[0]) is nn.Conv1d


def test_a_hybrid_model_computes_the_same():
    model = random_model("olmo_hybrid")
    tokens = mx.array([[5, 6, 7, 8, 9, 10]])
    expected = model(tokens)
    replace_convolutions(model)
    assert any(type(layer) is ShortConv1d for layer in model.modules())
    assert mx.allclose(model(tokens), expected, atol=1e-4)
