"""Facts of the machine that figures depend on. No names of hosts, users or directories."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OPENBLAS = "libopenblas.so.0"


def has_gpu() -> bool:
    """Whether MLX's default device is a GPU."""
    from mlxserver.engine.mlx import mx

    return bool(mx.default_device() == mx.Device(mx.gpu, 0))


def needs_openblas() -> bool:
    """Whether MLX computes with its slow bundled BLAS although the system has a fast one."""
    return platform.system() == "Linux" and not has_gpu() and _openblas_config() is not None


def read_machine() -> dict[str, Any]:
    """Processor, cores, memory (bytes), device, operating system and versions, ready for JSON."""
    import mlx.core as mx

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": str(mx.device_info().get("device_name", "unknown")),
        "gpu": has_gpu(),
        "system": _system(),
        "python": platform.python_version(),
        "blas": _openblas_config() if needs_openblas() else "MLX's own",
        "versions": {name: _version(name) for name in ("mlx", "mlx-lm", "transformers")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _openblas_config() -> str | None:
    try:
        library = ctypes.CDLL(OPENBLAS)
    except OSError:
        return None
    library.openblas_get_config.restype = ctypes.c_char_p
    return str(library.openblas_get_config().decode())


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor()


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name} {platform.machine()}"
