"""Folders of this program on this machine. Importing this module does not import MLX."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """What can be made anew: conversions, prefixes, kernels. $MLX_SERVER_CACHE, or the platform's place for caches."""
    if chosen := os.environ.get("MLX_SERVER_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "multi-model-mlx-server"
