"""Environment of MLX: what the process needs before it imports MLX.

Rule: prepare() runs before mlx.core is imported; mlx.py calls it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from importlib import metadata

from mlxserver.engine.platform import openblas
from mlxserver.engine.platform.folders import cache_directory

# MLX keeps its CUDA graphs, and cuDNN's plans, by shape, and ends the process when it has missed such a cache twice as
# often as it is large. A server meets new shapes as long as it lives. With MLX's own 400 graphs an H100 made 4,300
# tokens/s where it makes 6,400. Graphs of 20 operations, not of 100, let the GPU begin while the rest is prepared:
# a step took 3.4 ms where it took 4.5 (batch 1), and 5.0 where it took 5.7 (batch 32).
_CUDA = {
    "MLX_CUDA_GRAPH_CACHE_SIZE": "10000",
    "MLX_CUDA_SDPA_CACHE_SIZE": "1000",
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
    "MLX_MAX_OPS_PER_BUFFER": "20",
}

LARGEST_KEPT = 32 << 20  # bytes of the largest array whose memory is kept when it is freed
# glibc's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (its highest value) and M_ARENA_MAX, from <malloc.h>.
_MALLOPT = {-1: 2**31 - 1, -3: LARGEST_KEPT, -8: 1}


def prepare() -> None:
    """Load OpenBLAS if MLX uses it, configure MLX for a long-lived process, and keep the limit of open files."""
    openblas.preload()
    _keep_freed_memory()
    kernels = cache_directory() / f"cuda-kernels-{metadata.version('mlx')}"  # MLX's own place is gone after a restart
    for name, value in (_CUDA | {"MLX_PTX_CACHE_DIR": str(kernels)}).items() if sys.platform == "linux" else ():
        os.environ.setdefault(name, value)
    _import_mlx_lm()


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next array of that size: MLX's CPU backend allocates anew for each result.

    Returned to the system at once, as by default, every large result costs page faults: an attention over 2,000 tokens
    took three times as long. streams.free_memory() returns it when a model is unloaded.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for option, value in _MALLOPT.items():
        if hasattr(libc, "mallopt"):  # not in other C libraries
            libc.mallopt(option, value)


def _import_mlx_lm() -> None:
    """Import mlx_lm without its lowering of the limit of open files, which an ordinary user could never raise again."""
    lower = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        import mlx_lm.utils  # noqa: F401
    finally:
        resource.setrlimit = lower
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536, hard))
