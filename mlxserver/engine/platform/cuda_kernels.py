"""CUDA kernels of our own, compiled once per machine.

MLX compiles a custom kernel (mx.fast.cuda_kernel) in each process anew, together with headers that take NVRTC two
seconds. Ours need no header. They are compiled in a tenth of a second, and kept in the cache directory.

Rule: a kernel has pointers to its inputs first, then to its outputs, then its scalars (int, float).

MLX 0.32.4 takes no float that float32 has not.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence

from mlxserver.engine.mlx import mx

import numpy as np

from mlxserver.engine.platform import nvrtc
from mlxserver.engine.platform.folders import cache_directory
from mlxserver.engine.platform.kept_files import KeptFiles

_TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16", mx.float16: "float16"}
_PRELUDE = """
struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };
#define INFINITY __int_as_float(0x7f800000)
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(bfloat16* to, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
__device__ inline void store(float16* to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
"""

Output = tuple[tuple[int, ...], mx.Dtype]  # shape and type


@functools.cache
def is_available() -> bool:
    """Whether kernels can be compiled, and MLX computes on an NVIDIA GPU."""
    return bool(mx.cuda.is_available()) and mx.default_device().type == mx.gpu and nvrtc.is_available()


def supports(dtype: mx.Dtype) -> bool:
    """Whether kernels can read and write values of a type."""
    return dtype in _TYPES


class Kernel:
    """One kernel.

    parameters, body: of the function in CUDA C++. dtype: what its source calls T, which is converted by to_float(x) and
    store(pointer, x). constants: names of the source that are known when it is compiled.
    """

    def __init__(
        self,
        name: str,
        parameters: str,
        body: str,
        dtype: mx.Dtype | None = None,
        constants: Mapping[str, int] | None = None,
    ) -> None:
        lines = [_PRELUDE, f"using T = {_TYPES[dtype]};"] if dtype else []
        lines += [f"constexpr int {constant} = {value};" for constant, value in (constants or {}).items()]
        lines += [f'extern "C" __global__ void {name}({parameters}) {{', body, "}"]
        self.name = name
        self.source = "\n".join(lines)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        scalars: Sequence[int | float],
        outputs: Sequence[Output],
        *,
        blocks: tuple[int, int, int],
        threads: int,
    ) -> list[mx.array]:
        """Launch it. blocks: in x, y and z, each of so many threads. Raises nvrtc.CompilationFailed."""
        x, y, z = blocks
        return mx.fast.precompiled_cuda_kernel(
            name=self.name,
            compiled_source=self.binary,
            inputs=inputs,
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            scalars=[float(np.float32(each)) if isinstance(each, float) else each for each in scalars],
            grid=(x * threads, y, z),
            threadgroup=(threads, 1, 1),
            ensure_row_contiguous=True,
        )

    @functools.cached_property
    def binary(self) -> bytes:
        """What the GPU runs, from the cache directory or compiled now. Raises nvrtc.CompilationFailed."""
        architecture = str(mx.device_info()["architecture"])
        digest = hashlib.sha256(f"{nvrtc.version()} {architecture} {self.source}".encode()).hexdigest()
        files = KeptFiles(cache_directory() / "cuda-binaries", suffix=".cubin")
        name = f"{self.name}-{digest[:16]}"
        binary = files.read(name, _whole)
        if binary is None:
            binary = nvrtc.compile(self.source, architecture)
            files.write_bytes(name, hashlib.sha256(binary).digest() + binary)
        return binary


def _whole(content: bytes) -> bytes:
    """The binary of a file, behind its digest. Raises ValueError for a damaged one, which the driver might crash on."""
    size = hashlib.sha256().digest_size
    digest, binary = content[:size], content[size:]
    if hashlib.sha256(binary).digest() != digest:
        raise ValueError("the file is damaged")
    return binary
