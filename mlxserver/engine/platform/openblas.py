"""OpenBLAS under MLX's CPU build, which brings reference BLAS only (some seventy times slower).

Rule 1: the library is in the process before mlx.core is: its symbols win only then. mlx.py sees to it.
Rule 2: nothing here imports MLX.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from importlib import metadata
from pathlib import Path

LIBRARY = "libopenblas.so.0"

# OpenBLAS 0.3.21 (Debian 12) takes AMD's CPUs with AVX-512 for ones without: a product of 256 rows then runs at half
# its speed. And its threads would wait for work in a busy loop, on a core that other work could use.
_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
_THREAD_TIMEOUT = "12"  # as a power of two, in cycles

# CPU types for which OpenBLAS has kernels that multiply small matrices without copying them.
_SMALL_PRODUCTS = ("SkylakeX", "Cooperlake", "SapphireRapids")
# From this many threads on, OpenBLAS reads a matrix faster as a whole: one core reads pieces about as fast as four.
FEW_THREADS = 4

log = logging.getLogger("engine")


def preload() -> bool:
    """Load OpenBLAS into the process if this MLX would use it. False if it would and the library is missing."""
    return not is_wanted() or _library() is not None


def has_small_products() -> bool:
    """Whether MLX uses an OpenBLAS that multiplies small matrices without copying them first."""
    if (library := _library()) is None:
        return False
    library.openblas_get_corename.restype = ctypes.c_char_p
    return str(library.openblas_get_corename().decode()) in _SMALL_PRODUCTS


@functools.cache
def threads() -> int:
    """Number of threads that OpenBLAS started with; 1 without it."""
    library = _library()
    return int(library.openblas_get_num_threads()) if library else 1


def use_threads(count: int) -> None:
    """Set the number of threads of all further products, if OpenBLAS computes them."""
    library = _library()
    if library and library.openblas_get_num_threads() != count:
        library.openblas_set_num_threads(count)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """OpenBLAS, loaded into the process; None if it is missing, or MLX does not use it."""
    if not is_wanted():
        return None
    _set_up()
    try:
        return ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None


@functools.cache
def warn_if_missing() -> None:
    """Log once what to install if OpenBLAS is missing."""
    if not preload():
        log.warning(
            "%s is missing, so MLX is many times slower on this CPU. Debian, Ubuntu: "
            "apt-get install libopenblas0-pthread. Fedora: dnf install openblas-threads.",
            LIBRARY,
        )


def _set_up() -> None:
    """Set the variables that OpenBLAS reads when it is loaded, except those that are set already."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", _THREAD_TIMEOUT)
    cpu = _cpu()
    if cpu.get("vendor_id") == "AuthenticAMD" and set(cpu.get("flags", "").split()) >= _AVX512:
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def _cpu() -> dict[str, str]:
    """Linux's description of the first CPU."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def is_wanted() -> bool:
    """Whether this MLX computes on a Linux CPU."""
    if sys.platform != "linux":
        return False
    try:
        metadata.distribution("mlx-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
