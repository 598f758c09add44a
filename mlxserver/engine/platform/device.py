"""The device that MLX computes on, and what memory there is and is used. All sizes are bytes.

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
    """What MLX computes on. memory_bytes: Metal's recommended working set, a CUDA card's memory, or the system's."""

    name: str
    kind: DeviceKind
    memory_bytes: int


def is_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


@functools.cache
def describe() -> Device:
    """The device in use. It does not change while the process lives."""
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
    """From now on work may wait for another process, and for ever if that is gone."""
    global _depends_on_others
    _depends_on_others = True


def clear_cache() -> None:
    """Give back what MLX keeps of freed arrays.

    On a CPU that waits for all work of all threads, with Python's lock held: if one waits for a rank that is gone, the
    whole process stood still. There it is not done where there are ranks; what MLX keeps is little on a CPU.
    """
    if not (_depends_on_others and is_cpu()):
        mx.clear_cache()


def active_bytes() -> int:
    """Memory that live MLX arrays hold, on any thread."""
    return int(mx.get_active_memory())


def process_bytes() -> int:
    """Resident memory of this process: now on Linux, its highest elsewhere."""
    if sys.platform == "linux":
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return resident_pages * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _system_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
