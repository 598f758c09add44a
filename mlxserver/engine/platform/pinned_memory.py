"""Page-locked host memory of a CUDA device: what files are read into there, and written from.

MLX copies an array that it loads out of pageable memory, which is as slow with many threads as with few, and one that
it saves by way of managed memory, which it then reuses for arrays of models. A kernel reads and writes memory that is
page-locked at the speed of the bus.

Rule 1: one thread has a buffer at a time, and does not change it before what it uploads from it is evaluated.
Rule 2: a copy is one of bytes, of any type: one kernel in each direction, which the check of the first copy compiles.
Rule 3: where there is none (another device, no driver, a first copy that comes out wrong), MLX's own ways are taken.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from mlxserver.engine.mlx import mx

import numpy as np

from mlxserver.engine.platform import device
from mlxserver.engine.platform.cuda_kernels import Kernel

log = logging.getLogger("engine")

BUFFER_BYTES = 16 << 20
_BUFFERS = 9  # most of them: of the threads that read, and the one that writes
_ALIGNED = 16  # bytes that a thread of a kernel copies at once
_BLOCKS, _THREADS = 64, 256  # enough to fill the bus, and few enough to leave other kernels their share
_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE

_COPY = """
const size_t bytes = size[0], first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
const size_t step = (size_t)gridDim.x * blockDim.x;
size_t done = 0;
if ((reinterpret_cast<size_t>(from) | reinterpret_cast<size_t>(to)) % 16 == 0) {
  const size_t units = bytes / 16;
  #pragma unroll 4
  for (size_t n = first; n < units; n += step)
    reinterpret_cast<uint4*>(to)[n] = reinterpret_cast<const uint4*>(from)[n];
  done = units * 16;
}
for (size_t n = done + first; n < bytes; n += step) to[n] = from[n];
"""
_UPLOAD = """
const char* from = reinterpret_cast<const char*>(address[0]);
char* to = reinterpret_cast<char*>(out);
"""
_DOWNLOAD = """
const char* from = reinterpret_cast<const char*>(data);
char* to = reinterpret_cast<char*>(address[0]);
"""
_END = """
__threadfence_system();
if (first == 0) done_[0] = 1;
"""


class Buffer(Protocol):
    """Host memory that arrays are copied from and to. memory: its bytes."""

    memory: memoryview

    def upload(self, start: int, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """The array whose bytes begin at `start`, a multiple of ALIGNED; not evaluated."""

    def download(self, array: mx.array, start: int) -> mx.array:
        """Copy an array's bytes to those from `start` on, once what is returned is evaluated."""


class PinnedBuffer:
    """A Buffer in page-locked memory. Raises OSError where there is none."""

    def __init__(self, nbytes: int = BUFFER_BYTES) -> None:
        self._address = _allocated(nbytes)
        self.memory = memoryview((ctypes.c_char * nbytes).from_address(self._address)).cast("B")

    def upload(self, start: int, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """As Buffer.upload()."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.size
        content = _launched(_upload_kernel(), [], self._address + start, nbytes, (nbytes,), mx.uint8)
        return content.view(dtype).reshape(shape)

    def download(self, array: mx.array, start: int) -> mx.array:
        """As Buffer.download()."""
        content = array.reshape(-1).view(mx.uint8)
        return _launched(_download_kernel(), [content], self._address + start, array.nbytes, (1,), mx.uint32)


@contextmanager
def borrowed() -> Iterator[Buffer | None]:
    """A buffer of the calling thread's own for the block; None where there is no page-locked memory, or no more."""
    buffer = _taken()
    try:
        yield buffer
    finally:
        if buffer:
            _free.put(buffer)


def reserve() -> None:
    """Make all buffers, and compile what copies, so that no copy has to wait for that."""
    while (buffer := _made()) is not None:
        _free.put(buffer)


def aligned(nbytes: int) -> int:
    """The next multiple of the bytes at which arrays may begin in a buffer."""
    return -(-nbytes // _ALIGNED) * _ALIGNED


_free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
_tickets: queue.SimpleQueue[None] = queue.SimpleQueue()  # for buffers that may still be made
for _ in range(_BUFFERS):
    _tickets.put(None)


def _taken() -> Buffer | None:
    try:
        return _free.get_nowait()
    except queue.Empty:
        return _made()


def _made() -> Buffer | None:
    """A new buffer; None where there is no page-locked memory, or no more."""
    try:
        if is_available():
            _tickets.get_nowait()
            return PinnedBuffer()
    except (queue.Empty, OSError):
        pass
    return None


@functools.cache
def is_available() -> bool:
    """Whether copies from and to page-locked memory come out right. The first call takes up to a second."""
    if device.describe().kind != "cuda":
        return False
    try:
        return _is_right(PinnedBuffer(1 << 16))
    except Exception as error:  # of the driver, the compiler or the device: files are read and written without it
        log.info("Page-locked memory is not used: %s", error)
        return False


def _is_right(buffer: Buffer) -> bool:
    """Whether arrays come back as they were, of a size that is no multiple of anything."""
    size = 4099
    expected = np.arange(size, dtype=np.uint8)
    mx.eval(buffer.download(mx.array(expected), 0))
    down = bytes(buffer.memory[:size]) == expected.tobytes()
    up: bool = mx.array_equal(buffer.upload(0, (size,), mx.uint8), mx.array(expected)).item()  # type: ignore[assignment]
    return down and up


def _allocated(nbytes: int) -> int:
    """The address of so many bytes of page-locked memory, which stay until the process ends."""
    mx.eval(mx.zeros(8) + 1)  # makes the device's context that of this thread
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        address = ctypes.c_void_p()
        status = driver.cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE))
    except (OSError, AttributeError) as error:
        raise OSError(f"no CUDA driver: {error}") from error
    if status or not address.value:
        raise OSError(f"cuMemHostAlloc: error {status}")
    return address.value


def _launched(
    kernel: Kernel, inputs: Sequence[mx.array], address: int, nbytes: int, shape: Sequence[int], dtype: mx.Dtype
) -> mx.array:
    place, size = mx.array([address], dtype=mx.uint64), mx.array([nbytes], dtype=mx.uint64)
    return kernel([*inputs, place, size], [(shape, dtype)], blocks=(_BLOCKS, 1, 1), threads=_THREADS)[0]


@functools.cache
def _upload_kernel() -> Kernel:
    return Kernel("pinned_upload", ["address", "size"], ["out"], _UPLOAD + _COPY)


@functools.cache
def _download_kernel() -> Kernel:
    return Kernel("pinned_download", ["data", "address", "size"], ["done_"], _DOWNLOAD + _COPY + _END)
