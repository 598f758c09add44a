"""The kernels of decoder layers have the values of MLX's own, bit for bit. They need an NVIDIA GPU."""

from types import SimpleNamespace

from mlxserver.engine.mlx import mx

import pytest

from mlxserver.engine.platform import cuda_kernels, cuda_layers
from mlxserver.engine.platform.cuda_layers import HeadNorms, add_norm, split_heads
from mlxserver.engine.platform.layer_forms import Rotation

TYPES = pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
needs_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    names, call = [], cuda_kernels.Kernel.__call__

    def recorded(self, *arguments, **options):
        names.append(self._name)
        return call(self, *arguments, **options)

    monkeypatch.setattr(cuda_kernels.Kernel, "__call__", recorded)
    return names


def by_mlx(monkeypatch, compute, *arguments):
    """What MLX's operations give for the same."""
    with monkeypatch.context() as patch:
        patch.setattr(cuda_layers, "device", SimpleNamespace(describe=lambda: SimpleNamespace(kind="cpu")))
        return compute(*arguments)


def different(got, expected):
    """Of each array: how many values differ, and the furthest of them by how many representable values."""
    found = []
    for one, other in zip(got, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert mx.isfinite(other).all().item()
        bits = [mx.contiguous(array).view(mx.int16).astype(mx.int32) for array in (one, other)]
        a, b = (mx.where(own < 0, -(own & 0x7FFF), own) for own in bits)
        found.append(((a != b).sum().item(), mx.abs(a - b).max().item()))
    return found


def noise(dtype, *shape):
    return mx.random.normal(shape).astype(dtype)


WIDTHS = [64, 72, 100, 512, 576, 896, 1024, 1536, 2048, 2304, 2560, 3072, 4096, 5120, 7168, 8192, 12288]


@needs_cuda
@TYPES
@pytest.mark.parametrize("rows", [(1, 1), (1, 16), (5, 4), (33, 1)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_sum_and_its_norm_are_those_of_mlx(width, rows, dtype, monkeypatch, launched):
    mx.random.seed(width)
    arrays = noise(dtype, *rows, width), noise(dtype, *rows, width), (1 + 0.1 * noise(dtype, width)).astype(dtype)
    got = add_norm(*arrays, 1e-5)
    assert launched == ["add_norm"]
    assert different(got, by_mlx(monkeypatch, add_norm, *arrays, 1e-5)) == [(0, 0)] * 2


@needs_cuda
@TYPES
def test_values_of_any_size_have_the_norm_of_mlx(dtype, monkeypatch):
    mx.random.seed(0)
    x, r, weight = noise(dtype, 40, 1, 2048), noise(dtype, 40, 1, 2048), noise(dtype, 2048)
    x = x * (2.0 ** mx.arange(-30, 10)).astype(dtype)[:, None, None]
    assert different(add_norm(x, r, weight, 1e-6), by_mlx(monkeypatch, add_norm, x, r, weight, 1e-6)) == [(0, 0)] * 2


@needs_cuda
@TYPES
def test_weights_that_lie_anywhere_are_read(dtype, monkeypatch):
    x, weight = noise(dtype, 3, 1, 512), noise(dtype, 1030)
    arrays = x[:2], x[1:], weight[3:515]
    assert different(add_norm(*arrays, 1e-6), by_mlx(monkeypatch, add_norm, *arrays, 1e-6)) == [(0, 0)] * 2


@needs_cuda
def test_other_types_are_left_to_mlx(launched):
    x = mx.ones((1, 1, 64))
    add_norm(x, x, mx.ones((64,)), 1e-5)
    split_heads(x[0], 2, 1, Rotation(10000.0, 1.0, None), mx.zeros((1,), dtype=mx.int32), None)
    add_norm(x, x.astype(mx.float16), mx.ones((64,), dtype=mx.float16), 1e-5)
    assert not launched


HEADS = {
    "1B": (64, 32, 8),
    "8B": (128, 32, 8),
    "many heads": (128, 64, 8),
    "one key head": (256, 5, 1),
    "96 dimensions": (96, 6, 2),
    "80 dimensions": (80, 4, 4),
    "16 dimensions": (16, 4, 2),
}
ROWS = {
    "one token": ([0], 1),
    "one of a long sequence": ([100_000], 1),
    "rows": ([3, 100_000, 17, 0, 2047] * 6 + [70_000, 1, 255], 1),
    "verified tokens": ([5, 99_990, 40], 4),
    "most tokens": ([1234], 16),
}


def rotation(kind, dim):
    freqs = 500_000.0 ** (mx.arange(0, dim, 2) / dim)
    return {
        "base": Rotation(500_000.0, 1.0, None),
        "scaled": Rotation(10_000, 1 / 4, None),
        "frequencies": Rotation(None, 1.0, mx.where(freqs > 1000, freqs * 8, freqs * 1.3)),
    }[kind]


@needs_cuda
@TYPES
@pytest.mark.parametrize("kind", ["base", "scaled", "frequencies"])
@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize(("offsets", "tokens"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), HEADS.values(), ids=HEADS)
def test_heads_are_those_of_mlx(dim, heads, kv_heads, offsets, tokens, has_norms, kind, dtype, monkeypatch, launched):
    mx.random.seed(dim)
    product = noise(dtype, len(offsets) * tokens, (heads + 2 * kv_heads) * dim)
    norms = None
    if has_norms:
        norms = HeadNorms((1 + 0.1 * noise(dtype, dim)).astype(dtype), (1 + noise(dtype, dim)).astype(dtype), 1e-6)
    given = product, heads, kv_heads, rotation(kind, dim), mx.array(offsets, dtype=mx.int32), norms
    got = split_heads(*given)
    assert launched == ["split_heads"]
    found = different(got, by_mlx(monkeypatch, split_heads, *given))
    assert found[2] == (0, 0)
    if has_norms and dim & dim - 1:  # another order of additions, which a rounding may show
        assert all(count <= product.size / 500 for count, _ in found)
    else:
        assert found == [(0, 0)] * 3


@needs_cuda
def test_heads_of_other_sizes_are_left_to_mlx(launched):
    product = mx.zeros((1, 4 * 24), dtype=mx.bfloat16)
    split_heads(product, 2, 1, Rotation(10_000.0, 1.0, None), mx.zeros((1,), dtype=mx.int32), None)
    assert not launched
