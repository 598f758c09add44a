"""CUDA kernels of our own, whose binaries are put where MLX looks for them. They need an NVIDIA GPU."""

import os
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlxserver.engine.mlx import mx

import pytest

from mlxserver.engine.platform import cuda_kernels, nvrtc, streams
from mlxserver.engine.platform.cuda_kernels import Kernel

needs_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")
SOURCE = "const int n = blockIdx.x * BLOCK + threadIdx.x; if (n < x_shape[0]) out[n] = T(float(x[n]) * 0.1f);"


@pytest.fixture
def name():
    """A name of a kernel that no machine has a binary of; its files are removed."""
    unique = f"scaled_{uuid.uuid4().hex}"
    yield unique
    for file in kept(unique):
        file.unlink()


def kept(name):
    """The files of a kernel."""
    return list(Path(os.environ["MLX_PTX_CACHE_DIR"]).glob(f"custom_kernel_{name}_*"))


def scaled(x, name):
    """A tenth of x, by a kernel."""
    kernel = Kernel(name, ["x"], ["out"], SOURCE, {"T": x.dtype, "BLOCK": 32})
    return kernel([x], [(x.shape, x.dtype)], blocks=(-(-x.size // 32), 1, 1), threads=32)[0]


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_values_of_each_type_are_converted_as_mlx_converts_them(name, dtype):
    x = mx.random.normal((100,)).astype(dtype)
    assert mx.array_equal(scaled(x, name), (x.astype(mx.float32) * 0.1).astype(dtype))
    assert len(kept(name)) == 2


@needs_cuda
def test_a_kernel_may_read_by_strides_what_does_not_lie_in_order(name):
    x = mx.random.normal((8, 6, 5)).swapaxes(0, 2)[:, 1:]
    source = """
    const int n = threadIdx.x, a = n / (x_shape[1] * x_shape[2]), b = n / x_shape[2] % x_shape[1], c = n % x_shape[2];
    if (n < SIZE) out[n] = x[a * x_strides[0] + b * x_strides[1] + c * x_strides[2]];
    """
    kernel = Kernel(name, ["x"], ["out"], source, {"SIZE": x.size}, copies=False)
    assert mx.array_equal(kernel([x], [(x.shape, x.dtype)], blocks=(1, 1, 1), threads=256)[0], x)
    assert len(kept(name)) == 2


@needs_cuda
def test_what_is_put_there_is_what_runs(name, monkeypatch):
    compile = nvrtc.compile
    monkeypatch.setattr(nvrtc, "compile", lambda source, *given: compile(source.replace("0.1f", "7.0f"), *given))
    assert scaled(mx.ones((100,)), name).tolist() == [7.0] * 100


@needs_cuda
def test_threads_that_need_a_kernel_at_once_wait_for_one_binary(name, monkeypatch):
    compile, compiled = nvrtc.compile, []

    def slow(*given):
        compiled.append(given)
        time.sleep(0.5)
        return compile(*given)

    def compute(_):
        with streams.thread_stream():
            return scaled(mx.ones((100,)), name).tolist()

    monkeypatch.setattr(nvrtc, "compile", slow)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(compute, range(4))] == [scaled(mx.ones((100,)), name).tolist()] * 4
    assert len(compiled) == 1


@needs_cuda
def test_what_can_not_be_put_there_is_compiled_by_mlx(name, monkeypatch):
    def fail(*_):
        raise nvrtc.CompilationFailed("no compiler")

    monkeypatch.setattr(nvrtc, "compile", fail)
    assert mx.allclose(scaled(mx.ones((100,)), name), mx.full((100,), 0.1))
    assert not kept(name)


@needs_cuda
def test_a_program_that_is_wrong_is_refused_with_the_log():
    with pytest.raises(nvrtc.CompilationFailed, match="nonsense"):
        nvrtc.compile("nonsense;", mx.device_info()["architecture"])


@pytest.mark.skipif(sys.platform != "linux", reason="MLX has CUDA on Linux")
@pytest.mark.parametrize(("text", "number"), [("", 6142509188972423790), ("hello", 2762169579135187400)])
def test_names_have_the_hash_of_the_c_library(text, number):
    """As a program of g++ prints it."""
    assert cuda_kernels._hash(text) == number
