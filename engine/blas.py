"""OpenBLAS under MLX's CPU build, which brings reference BLAS only (some seventy times slower).

Rule 1: the library is in the process before mlx.core is: its symbols win only then. engine/__init__.py sees to it.
Rule 2: nothing here imports MLX.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from importlib import metadata

LIBRARY = "libopenblas.so.0"
log = logging.getLogger("engine")


@functools.cache
def preload() -> bool:
    """Load OpenBLAS for the whole process if this MLX would use it. False when it would and the library is missing."""
    if not _is_wanted():
        return True
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


@functools.cache
def warn_if_missing() -> None:
    """Say once how to make this machine's CPU fast, if it isn't."""
    if not preload():
        log.warning(
            "%s is missing, so MLX is many times slower on this CPU. Debian, Ubuntu: "
            "apt-get install libopenblas0-pthread. Fedora: dnf install openblas-threads.",
            LIBRARY,
        )


def _is_wanted() -> bool:
    if sys.platform != "linux":
        return False
    try:
        metadata.distribution("mlx-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
