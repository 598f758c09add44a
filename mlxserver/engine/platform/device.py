"""Device that MLX computes on, and its memory. All sizes are bytes.

Rule 1: the process-wide wired limit is set here and nowhere else, once.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform.policy import DeviceKind


@dataclass(frozen=True, slots=True)
class Device:
    """A device. memory_bytes: Metal's recommended working set, a CUDA card's memory, or the system's."""

    name: str
    kind: DeviceKind
    memory_bytes: int


def is_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


@functools.cache
def describe() -> Device:
    """The device in use, which never changes in a process."""
    properties = mx.device_info()
    name = str(properties.get("device_name", "unknown"))
    if is_cpu():
        return Device(name, "cpu", _system_bytes())
    kind: DeviceKind = "metal" if mx.metal.is_available() else "cuda"
    sizes = (properties.get(key) for key in ("max_recommended_working_set_size", "total_memory", "memory_size"))
    return Device(name, kind, next((int(size) for size in sizes if size), _system_bytes()))


@functools.cache
def set_wired_limit_once() -> None:
    """Keep as much memory resident as the device recommends. Without a recommendation nothing happens."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    if limit:
        mx.set_wired_limit(int(limit))


_depends_on_others = False


def depend_on_others() -> None:
    """Note that computations may wait for another process from now on, and for ever if it is lost."""
    global _depends_on_others
    _depends_on_others = True


def clear_cache() -> None:
    """Free MLX's cache of freed arrays.

    On a CPU that waits for all work of all threads, with Python's lock held: if one of them waits for a lost rank, the
    whole process stands still. So ranks do not do it on a CPU, where the cache is small.
    """
    if not (_depends_on_others and is_cpu()):
        mx.clear_cache()


def active_bytes() -> int:
    """Memory of live MLX arrays of all threads."""
    return int(mx.get_active_memory())


def process_bytes() -> int:
    """Resident memory of this process: the present one on Linux, the highest elsewhere."""
    if sys.platform == "linux":
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return resident_pages * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _system_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
