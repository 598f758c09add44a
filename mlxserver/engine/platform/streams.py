"""MLX streams of engine threads, and the return of freed memory to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import device


@contextmanager
def thread_stream() -> Iterator[None]:
    """A stream of the calling thread's own; released when the block ends."""
    stream = mx.new_thread_local_stream(mx.default_device())
    try:
        with mx.stream(stream):
            yield
    finally:
        mx.synchronize(stream)
        mx.clear_streams()


@contextmanager
def finished_work() -> Iterator[None]:
    """Wait at the end of the block until the calling thread's stream has finished its work."""
    try:
        yield
    finally:
        mx.synchronize()


def free_memory() -> None:
    """Return the memory of a dropped model to the system."""
    # Python's cache of attributes keeps names. One that was allocated in the middle of a tokenizer keeps the megabyte
    # around it: eight MiB more after twenty loads.
    sys._clear_type_cache()
    gc.collect()
    device.clear_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
