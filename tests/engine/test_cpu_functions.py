"""Native functions between the products of a layer are MLX's, to rounding."""

from mlxserver.engine.mlx import mx, nn

import numpy as np
import pytest

from mlxserver.engine.platform import cpu_kernels
from mlxserver.engine.platform.native.extension import native

pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels are not built")


@pytest.fixture(autouse=True)
def same_numbers():
    mx.random.seed(0)


def random(*shape):
    return mx.random.normal(shape)


def levels():
    return native().levels() if native() else []


def assert_close(ours, theirs, atol=2e-6):
    assert (ours.dtype, ours.shape) == (mx.float32, theirs.shape)
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=2e-5, atol=atol)


def assert_attends(ours, theirs):
    """Scores are up to 10: each is rounded by up to 1e-6, and so is the weight of a value of up to 4, in both."""
    assert_close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("shape", [(1, 1, 576), (3, 5, 7), (2, 1), (40, 1000), (0, 8)])
def test_norms(level, shape):
    x, weight = random(*shape) * 3, random(shape[-1])
    assert_close(native().rms_norm(x, weight, 1e-5, level), mx.fast.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("shape", [(1, 1, 384), (3, 5, 7), (2, 1), (40, 1000), (0, 8)])
def test_layer_norms(level, shape):
    x, weight, bias = random(*shape) * 3 + 2, random(shape[-1]), random(shape[-1])
    for own in (bias, None):
        expected = mx.fast.layer_norm(x, weight, own, 1e-5)
        assert_close(native().layer_norm(x, weight, own, 1e-5, level), expected, 1e-5)


@pytest.mark.parametrize("level", levels())
def test_gelu(level):
    x = mx.concatenate([mx.linspace(-40.0, 40.0, 4001), mx.array([-0.0, 1e30, -1e30, float("inf")])])
    np.testing.assert_allclose(np.array(native().gelu(x, level)), np.array(nn.gelu(x)), atol=1e-6)
    assert mx.isnan(native().gelu(mx.array([float("nan")]), level)).item()


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("slope", "cubic"), [(1.0, 0.0), (1.6, 0.07)])
def test_swish(level, slope, cubic):
    x = mx.concatenate([mx.linspace(-40.0, 40.0, 4001), mx.array([-0.0, 1e30, -1e30])])
    expected = x * mx.sigmoid(slope * x + (cubic * x) * x * x)
    np.testing.assert_allclose(np.array(native().swish(x, slope, cubic, level)), np.array(expected), atol=1e-6)
    assert mx.isnan(native().swish(mx.array([float("nan")]), slope, cubic, level)).item()


def test_functions_are_part_of_one_that_is_compiled_for_any_shape():
    for function in (cpu_kernels.gelu, cpu_kernels.gelu_approx):
        gated = mx.compile(lambda gate, x, function=function: function(gate) * x, shapeless=True)
        for shape in ((3, 5), (2, 1, 40)):
            gate, x = random(*shape), random(*shape)
            assert_close(gated(gate, x), function(gate) * x)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("shape", [(1, 1, 1536), (3, 5, 7), (1,), (16, 1, 1536), (0, 8)])
def test_gates(level, shape):
    gate, x = random(*shape) * 20, random(*shape)
    assert_close(native().swiglu(gate, x, level), gate * mx.sigmoid(gate) * x)


def test_gates_of_extreme_values_are_finite():
    gate = mx.array([-1000.0, -100.0, -88.0, 0.0, 88.0, 1000.0])
    expected = mx.array([0.0, 0.0, 0.0, 0.0, 88.0, 1000.0])
    assert mx.allclose(native().swiglu(gate, mx.ones(6)), expected, atol=1e-30)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("batch", "offsets"), [(1, [7]), (3, [7]), (3, [0, 50, 2000])])
def test_rotations(level, batch, offsets):
    for dim in (64, 6):
        x = random(batch, 5, 4, dim).transpose(0, 2, 1, 3)
        offset = mx.array(offsets)
        cosines, sines = cpu_kernels.turns(offset, 5, dim, False, 10000.0, 1.0, None)
        expected = mx.fast.rope(
            x, dim, traditional=False, base=10000.0, scale=1.0, offset=mx.broadcast_to(offset, (batch,))
        )
        np.testing.assert_allclose(np.array(native().rotate(x, cosines, sines, level)), np.array(expected), atol=2e-3)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize(("length", "tokens"), [(1, 1), (1, 7), (1, 70), (1, 1300), (2, 9), (16, 530), (40, 40)])
def test_attention_of_few_tokens(level, heads, groups, length, tokens):
    for dim, value_dim in ((64, 64), (20, 36), (5, 3)):
        q = random(2, length, heads, dim).transpose(0, 2, 1, 3)
        keys, values = random(3, groups, 1320, dim)[:2, :, :tokens], random(3, groups, 1320, value_dim)[:2, :, :tokens]
        visible = mx.array([tokens, max(length, tokens // 2)])[:, None, None, None] - mx.arange(length)[::-1, None]
        for mask in (None, mx.where(mx.arange(tokens) < visible, 0.0, -1e30), mx.zeros((1, 1, length, tokens))):
            expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.3, mask=mask)
            assert_attends(native().attend(q, keys, values, 0.3, mask, False, level), expected)
        expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.3, mask="causal")
        assert_attends(native().attend(q, keys, values, 0.3, None, True, level), expected)


FORMATS = [(4, 32), (4, 128), (8, 64)]


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_values_are_quantized_bit_for_bit_as_mlx_does(level, bits, group, shift):
    x = mx.concatenate(
        [random(2, 3, 40, 128) + shift, mx.zeros((2, 3, 1, 128)), mx.full((2, 3, 1, 128), shift)], axis=2
    )
    for own in (x, x[:, :, ::2], x * 1e-9, x * 1e9):
        ours, theirs = native().quantize(own, group, bits, level), mx.quantize(own, group_size=group, bits=bits)
        assert all(map(mx.array_equal, ours, theirs))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_values_are_dequantized_as_mlx_does(level, bits, group):
    parts = mx.quantize(random(2, 3, 41, 256), group_size=group, bits=bits)
    for own in (parts, [part[:, :, 3:30] for part in parts], [part[:, :, ::2] for part in parts]):
        expected = mx.dequantize(*own, group_size=group, bits=bits)
        assert mx.allclose(native().dequantize(*own, group, bits, level), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize(("length", "tokens"), [(1, 1), (1, 300), (3, 1100), (30, 70)])
def test_attention_to_quantized_keys_and_values(level, bits, group, length, tokens):
    q, held = random(2, 6, length, 128), []
    for dim in (128, 256):
        parts = mx.quantize(random(3, 2, 1200, dim), group_size=group, bits=bits)
        held.append(tuple(part[:2, :, :tokens] for part in parts))
    keys, values = (mx.dequantize(*parts, group_size=group, bits=bits) for parts in held)
    mask = mx.where(mx.arange(tokens) <= mx.arange(length)[:, None], 0.0, -1e30)[None, None]
    for own, is_causal in ((None, False), (mask, False), (None, length <= tokens)):
        expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.1, mask="causal" if is_causal else own)
        assert_attends(native().attend(q, *held, 0.1, own, is_causal, level), expected)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("tokens", [40, 512, 700])
def test_a_sequence_has_the_same_attention_beside_others_and_with_hidden_tokens_behind_its_own(level, tokens):
    q, keys, values = random(3, 6, 1, 64), random(3, 2, 1600, 64), random(3, 2, 1600, 64)
    alone = native().attend(q[:1], keys[:1, :, :tokens], values[:1, :, :tokens], 0.125, None, False, level)
    mask = mx.where(mx.arange(1600) < mx.array([tokens, 1600, 1])[:, None, None, None], 0.0, -1e30)
    assert mx.array_equal(native().attend(q, keys, values, 0.125, mask, False, level)[:1], alone)


@pytest.mark.parametrize("level", levels())
def test_segments_with_scores_that_are_far_apart_are_combined(level):
    q, values = mx.ones((1, 2, 1, 8)), random(1, 1, 1300, 8)
    for scores in (mx.arange(1300.0), -mx.arange(1300.0), mx.full((1300,), -1e30), mx.full((1300,), 200.0)):
        mask = scores[None, None, None]
        keys = mx.zeros((1, 1, 1300, 8))
        expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)
        assert_attends(native().attend(q, keys, values, 1.0, mask, False, level), expected)


@pytest.mark.parametrize("level", levels())
def test_a_mask_is_beside_what_is_causal(level):
    q, keys, mask = random(2, 4, 20, 16), random(2, 2, 90, 16), random(2, 1, 20, 90)
    causal = mx.where(mx.arange(70, 90)[:, None] >= mx.arange(90), 0.0, -1e30)
    expected = mx.fast.scaled_dot_product_attention(q, keys, keys, scale=0.3, mask=mask + causal)
    assert_attends(native().attend_in_blocks(q, keys, keys, 0.3, mask, True, level), expected)
    assert_attends(
        native().attend_in_blocks(q[:, :, -1:], keys, keys, 0.3, mask[:, :, -1:], True, level), expected[:, :, -1:]
    )


@pytest.mark.parametrize("level", levels())
def test_attention_of_scores_that_grow_and_shrink_by_far(level):
    q, keys, values = mx.ones((1, 1, 40, 8)), mx.zeros((1, 1, 200, 8)), random(1, 1, 200, 8)
    for scores in (mx.arange(200.0) * 5, -mx.arange(200.0) * 5, mx.full((200,), -1e30)):
        expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=scores[None, None, None])
        assert_attends(
            native().attend_in_blocks(q, keys, values, 1.0, scores[None, None, None], False, level), expected
        )


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3)])
@pytest.mark.parametrize(
    ("length", "tokens", "dim", "value_dim"),
    [
        (1, 1, 8, 8),
        (16, 16, 32, 32),
        (5, 300, 24, 13),
        (130, 130, 32, 32),
        (97, 260, 64, 64),
        (20, 140, 576, 3),
        (3, 70, 9, 768),
    ],
)
def test_attention_in_blocks(level, heads, groups, length, tokens, dim, value_dim):
    q = random(2, length, heads, dim).transpose(0, 2, 1, 3)
    keys, values = random(3, groups, 320, dim)[:2, :, :tokens], random(3, groups, 320, value_dim)[:2, :, :tokens]
    scale = dim**-0.5
    ends = mx.array([tokens, max(1, tokens // 3)])[:, None, None, None]
    masks = {
        "none": None,
        "of tokens": mx.where(mx.arange(tokens) < ends, 0.0, np.finfo(np.float32).min),
        "of the first tokens": mx.where(mx.arange(tokens) >= tokens - ends, 0.0, float("-inf")),
        "of rows": random(1, 1, length, tokens),
        "of heads": random(2, heads, length, tokens),
    }
    for mask in masks.values():
        expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
        assert_attends(native().attend_in_blocks(q, keys, values, scale, mask, False, level), expected)
    expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask="causal")
    assert_attends(native().attend_in_blocks(q, keys, values, scale, None, True, level), expected)


def test_keys_of_any_strides():
    q = random(2, 4, 1, 16)
    keys, values = random(2, 30, 2, 16).transpose(0, 2, 1, 3), random(2, 2, 16, 30).swapaxes(2, 3)
    expected = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.3)
    assert_attends(native().attend(q, keys, values, 0.3), expected)
    assert_attends(native().attend_in_blocks(q, keys, values, 0.3), expected)


def test_shapes_that_do_not_fit_are_refused():
    q, keys = random(1, 3, 1, 16), random(1, 2, 5, 16)
    held, wide = (native().quantize(random(1, 2, 5, dim), 32, 8) for dim in (32, 320))
    for call in (
        lambda: native().attend(q, keys, keys, 1.0),
        lambda: native().attend(q[:, :2], keys, keys, 1.0, mx.zeros((1, 1, 1, 4))),
        lambda: native().attend(random(1, 2, 1, 32), held, keys, 1.0),
        lambda: native().attend(random(1, 2, 1, 48), held, held, 1.0),
        lambda: native().attend(random(1, 2, 1, 32), held, (*held[:2], held[2][:, :, :4]), 1.0),
        lambda: native().attend(random(1, 2, 1, 320), wide, wide, 1.0),
        lambda: native().quantize(keys, 32, 8),
        lambda: native().quantize(random(4, 32), 32, 3),
        lambda: native().dequantize(*held, 32, 4),
        lambda: native().dequantize(*held[:2], held[2][:, :, :4], 32, 8),
        lambda: native().attend_in_blocks(q, keys, keys, 1.0),
        lambda: native().attend_in_blocks(q[:, :2], keys, keys, 1.0, mx.zeros((1, 1, 1, 1))),
        lambda: native().rms_norm(q, mx.ones(15), 1e-5),
        lambda: native().layer_norm(q, mx.ones(16), mx.ones(15), 1e-5),
        lambda: native().swiglu(q, keys),
        lambda: native().rotate(q, mx.ones((1, 1, 1, 4)), mx.ones((1, 1, 2, 4))),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            call()
