"""CUDA kernels of our own: compiled once, kept, and run. They need an NVIDIA GPU."""

from mlxserver.engine.mlx import mx

import pytest

from mlxserver.engine.platform import cuda_kernels, nvrtc
from mlxserver.engine.platform.cuda_kernels import Kernel

needs_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")
PARAMETERS = "const T* x, T* out, int count, float by"
BODY = "const int n = blockIdx.x * BLOCK + threadIdx.x; if (n < count) store(out + n, to_float(x[n]) * by);"


def scaled(x, by=0.1):
    """x times a number, by a kernel."""
    kernel = Kernel("scaled", PARAMETERS, BODY, x.dtype, {"BLOCK": 32})
    (out,) = kernel([x], [x.size, by], [(x.shape, x.dtype)], blocks=(-(-x.size // 32), 1, 1), threads=32)
    return out


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of kept binaries, empty."""
    monkeypatch.setenv("MLX_SERVER_CACHE", str(tmp_path))
    return tmp_path / "cuda-binaries"


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_values_of_each_type_are_converted_as_mlx_converts_them(kept, dtype):
    x = mx.random.normal((100,)).astype(dtype)
    assert mx.array_equal(scaled(x), (x.astype(mx.float32) * 0.1).astype(dtype))


@needs_cuda
def test_a_binary_is_kept_and_a_damaged_one_is_made_anew(kept, monkeypatch):
    x = mx.arange(100, dtype=mx.float32)
    mx.eval(scaled(x))
    (file,) = kept.iterdir()
    made, compile = [], nvrtc.compile
    monkeypatch.setattr(nvrtc, "compile", lambda *given: made.append(given) or compile(*given))
    mx.eval(scaled(x))
    assert not made
    file.write_bytes(file.read_bytes()[:-1])
    assert mx.allclose(scaled(x), x * 0.1)
    assert len(made) == 1


@needs_cuda
def test_a_program_that_is_wrong_is_refused_with_the_log(kept):
    with pytest.raises(nvrtc.CompilationFailed, match="nonsense"):
        mx.eval(Kernel("wrong", "float* out", "nonsense;")([], [], [((1,), mx.float32)], blocks=(1, 1, 1), threads=1))


@pytest.mark.skipif(mx.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_without_a_gpu_there_are_none():
    assert not cuda_kernels.is_available()
