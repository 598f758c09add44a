"""Where the shell keeps its own files, and how a file of the user goes into a prompt."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from mlxserver.client.transcript import read_text

APPLICATION = "multi-model-mlx-server"


def history_file() -> Path | None:
    """The file for what was typed, in the user's state directory, readable by the user alone. None: not to be had."""
    if sys.platform == "darwin":
        states = Path.home() / "Library" / "Application Support"
    else:
        states = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = states / APPLICATION / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("a"):
            return path
    except OSError:
        return None


def quote_file(path: Path) -> str:
    """A file's name and its text in a fence that the text can't close. Raises FileUnusable."""
    text = read_text(path)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{path.name}:\n{fence}\n{text.removesuffix(chr(10))}\n{fence}"
