"""CUDA kernels of our own, compiled once per machine.

MLX compiles a custom kernel in each process anew, with headers that take NVRTC two seconds. Before that it looks into
its cache directory, where it never puts the binary of such a kernel itself (MLX 0.32.4, backend/cuda/jit_module.cpp).
So it is put there: the same source, compiled in a third of a second without those headers, under the name that MLX
looks for.

Rule: a source gets by with what _PRELUDE has. Where MLX looks for another name after all, it compiles the source
      itself, which takes longer, and nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import nvrtc
from mlxserver.engine.platform.kept_files import write_whole

log = logging.getLogger("engine")

_TYPES = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
    mx.float64: "double",
}
# What MLX's headers have of this, in few lines.
_PRELUDE = """
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
#define INFINITY __int_as_float(0x7f800000)
struct Shape {
  int32_t sizes[10];
  int32_t operator[](int n) const { return sizes[n]; }
};
struct Strides {
  int64_t sizes[10];
  int64_t operator[](int n) const { return sizes[n]; }
};
struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
struct __half {
  unsigned short bits;
  __half() = default;
  explicit __half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
"""
# What MLX puts around a source.
_BEFORE = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

namespace mlx::core::cu {

namespace cg = cooperative_groups;

"""
_BEHIND = "\n}\n\n} // namespace mlx::core::cu\n"
_SEED = 0xC70F6907  # of std::hash

_compiling = threading.Lock()

Constants = Mapping[str, int | float | mx.Dtype]


class Kernel:
    """A kernel, as mx.fast.cuda_kernel() makes it.

    constants: integers, floats (of 32 bits) and types that its source has by name. The source may have the shape of an
    input, `x_shape`, and its strides, `x_strides`. copies: inputs whose values do not lie in order are copied.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: str,
        constants: Constants | None = None,
        *,
        copies: bool = True,
    ) -> None:
        self._name, self._inputs, self._outputs, self._copies = name, list(inputs), list(outputs), copies
        self._source = "".join(_constant(*each) for each in (constants or {}).items()) + source
        self._kept: set[str] = set()  # parameters, for each types of its inputs and outputs

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
        *,
        blocks: tuple[int, int, int],
        threads: int,
    ) -> list[mx.array]:
        """Launch it. outputs: shape and type of each. blocks: in x, y and z, each of so many threads."""
        parameters = self._parameters(inputs, [dtype for _, dtype in outputs])
        if parameters not in self._kept:
            with _compiling:  # or else another thread would have MLX compile what this one is compiling
                if parameters not in self._kept:
                    self._keep_binary(parameters)
                    self._kept.add(parameters)
        x, y, z = blocks
        return self._launch(  # type: ignore[no-any-return]
            inputs=inputs,
            output_shapes=[tuple(shape) for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            grid=(x * threads, y, z),
            threadgroup=(threads, 1, 1),
        )

    @functools.cached_property
    def _launch(self) -> Any:
        return mx.fast.cuda_kernel(
            name=self._name,
            input_names=self._inputs,
            output_names=self._outputs,
            source=self._source,
            ensure_row_contiguous=self._copies,
        )

    def _parameters(self, inputs: Sequence[mx.array], outputs: Sequence[mx.Dtype]) -> str:
        """The parameters of the function, as MLX writes them."""
        lines = []
        for name, array in zip(self._inputs, inputs, strict=True):
            lines.append(f"    const {_TYPES[array.dtype]}* {name}")
            for info in ("shape", "strides"):
                if array.ndim and f"{name}_{info}" in self._source:
                    lines.append(f"    const __grid_constant__ {info.capitalize()} {name}_{info}")
        lines += [f"    {_TYPES[dtype]}* {name}" for name, dtype in zip(self._outputs, outputs, strict=True)]
        return ",\n".join(lines)

    def _keep_binary(self, parameters: str) -> None:
        """Put the binary where MLX looks for it, unless it is there."""
        function = f"custom_kernel_{self._name}"
        definition = f"__global__ void {function}(\n{parameters}) {{\n{self._source}"
        try:
            file = Path(os.environ["MLX_PTX_CACHE_DIR"]) / f"{function}_{_hash(_BEFORE + definition + _BEHIND):x}.ptx"
            if file.exists():
                return
            binary = nvrtc.compile(f'{_PRELUDE}extern "C" {definition}\n}}', str(mx.device_info()["architecture"]))
            write_whole(file.with_suffix(".txt"), f"mlx::core::cu::{function}\t{function}\n".encode())
            write_whole(file, binary)
        except (KeyError, OSError, nvrtc.CompilationFailed) as error:
            log.info("The CUDA kernel %s is left to MLX to compile: %s", self._name, error)


def _constant(name: str, value: int | float | mx.Dtype) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {_TYPES[value]};\n"
    if isinstance(value, float):
        return f"constexpr float {name} = {ctypes.c_float(value).value.hex()}f;\n"
    return f"constexpr int {name} = {value};\n"


def _hash(text: str) -> int:
    """std::hash<std::string> of libstdc++, which MLX is linked with. Raises OSError without it."""
    content = text.encode()
    hash_bytes = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    hash_bytes.restype, hash_bytes.argtypes = ctypes.c_size_t, (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t)
    return int(hash_bytes(content, len(content), _SEED))
