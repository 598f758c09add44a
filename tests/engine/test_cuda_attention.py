"""The kernel for the attention of decode steps. It needs an NVIDIA GPU; elsewhere MLX's attention is used."""

from mlxserver.engine.mlx import mx

import pytest

from mlxserver.engine.kv_cache.ragged import Ragged, attention, ragged_layers
from mlxserver.engine.kv_cache.slots import SlotLayer, StepPositions
from mlxserver.engine.platform import cuda_attention

needs_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")


def slot_classes(lengths, kv_heads, dim, dtype, tokens=1):
    """One layer of slots per list of lengths, the last tokens included, filled with noise also behind them."""
    classes = []
    for own in lengths:
        capacity = -(-max(own) // 256) * 256
        keys, values = (mx.random.normal((len(own), kv_heads, capacity, dim)).astype(dtype) for _ in "kv")
        step = StepPositions(mx.array([length - tokens for length in own], dtype=mx.int32), len(own), capacity)
        classes.append([SlotLayer(keys, values, step)])
    return classes


def expected(queries, classes, lengths, scale):
    """The attention of every row by itself, in float32."""
    rows, at = [], 0
    for (layer,), own in zip(classes, lengths, strict=True):
        for slot, length in enumerate(own):
            k, v = (array[slot : slot + 1, :, :length].astype(mx.float32) for array in (layer.keys, layer.values))
            q = queries[at : at + 1].astype(mx.float32)
            rows.append(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal"))
            at += 1
    return mx.concatenate(rows)


def attended(heads, kv_heads, dim, lengths, dtype=mx.bfloat16, tokens=1):
    """The largest difference of the rows' attention to what is expected, of vectors whose largest values are near 1."""
    mx.random.seed(0)
    classes = slot_classes(lengths, kv_heads, dim, dtype, tokens)
    count = sum(map(len, lengths))
    queries = mx.random.normal((count, heads, tokens, dim)).astype(dtype)
    wanted = expected(queries, classes, lengths, dim**-0.5)
    (layer,) = ragged_layers(classes, has_kernel=True)
    keys, values = (Ragged([getattr(own, name) for (own,) in classes]) for name in ("keys", "values"))
    result = attention(queries, keys, values, layer, dim**-0.5, layer.make_mask(tokens))
    return mx.abs(result.astype(mx.float32) - wanted).max().item()


CASES = {
    "one short row": (4, 4, 64, [[3]]),
    "grouped heads": (32, 8, 64, [[300, 1, 17, 511]]),
    "wide heads": (8, 2, 128, [[257, 1024]]),
    "many heads per key head": (48, 2, 64, [[700, 20]]),
    "one key head": (16, 1, 256, [[100, 2000]]),
    "short heads": (6, 3, 32, [[64, 65]]),
    "a long row": (32, 8, 64, [[33_000]]),
    "two classes": (32, 8, 64, [[200, 900, 1], [9000]]),
    "three classes": (8, 8, 128, [[5], [1500, 1800], [5000, 8191]]),
}


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_row_attends_to_its_own_tokens(case, dtype):
    assert attended(*case, dtype) < 0.02


@pytest.mark.parametrize("tokens", [2, 5, 16])
@pytest.mark.parametrize("lengths", [[[200, 900, 18], [9000]], [[300, 16]]], ids=["parts", "whole"])
def test_each_of_several_tokens_attends_to_those_before_it(tokens, lengths):
    assert attended(32, 8, 64, lengths, tokens=tokens) < 0.02


@needs_cuda
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_takes_all_of_these(case):
    heads, kv_heads, dim, lengths = case
    classes = slot_classes(lengths, kv_heads, dim, mx.bfloat16)
    queries = mx.zeros((1, heads, 1, dim), dtype=mx.bfloat16)
    assert cuda_attention.supports(
        queries, [layer.keys for (layer,) in classes], [layer.values for (layer,) in classes]
    )


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 4, 17, 64), mx.bfloat16), ((1, 4, 1, 80), mx.bfloat16), ((1, 4, 1, 64), mx.float32)]
)
def test_other_shapes_and_types_are_left_to_mlx(shape, dtype):
    keys = [mx.zeros((1, 4, 256, shape[3]), dtype=dtype)]
    assert not cuda_attention.supports(mx.zeros(shape, dtype=dtype), keys, keys)
