"""NVRTC, NVIDIA's compiler of CUDA C++ at run time, which MLX for CUDA has loaded.

https://docs.nvidia.com/cuda/nvrtc has the functions.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")  # of mlx-cuda-13 and mlx-cuda-12


class CompilationFailed(Exception):
    """NVRTC took no program; the message has its log."""


def compile(source: str, architecture: str) -> bytes:
    """Binary (cubin) of a program without #include lines. architecture: as in sm_90.

    Raises CompilationFailed.
    """
    nvrtc, program = _need(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        chosen = f"--gpu-architecture={architecture}", "--device-as-default-execution-space"
        options = (ctypes.c_char_p * len(chosen))(*map(str.encode, chosen))
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            log = _content(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            raise CompilationFailed(log.rstrip(b"\0\n").decode(errors="replace"))
        return _content(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _content(program: ctypes.c_void_p, get_size: Callable[..., int], get: Callable[..., int]) -> bytes:
    size = ctypes.c_size_t()
    _check(get_size(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check(get(program, content))
    return content.raw


def _check(status: int) -> None:
    if status:
        raise CompilationFailed(f"NVRTC ended with status {status}")


def _need() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise CompilationFailed(f"none of {', '.join(_LIBRARIES)} can be loaded")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
