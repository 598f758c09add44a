"""Environments of Python programs under test, each apart from the server's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT = 600  # seconds for an installation, and for a run


def programs_of(directory: Path, packages: Sequence[str]) -> Path:
    """Install packages into an environment below a directory, unless it is there; the directory of its programs."""
    programs = directory / "venv" / "bin"
    if not programs.exists():
        directory.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "venv", str(programs.parent)])
        run([str(programs / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages])
    return programs


def run(command: Sequence[str], **options: Any) -> str:
    """Run a command to its end; what it printed. Raises CalledProcessError, TimeoutExpired."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT, **options)
    return str(done.stdout)
