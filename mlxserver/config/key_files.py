"""Keys that are kept in files: one a line; empty lines and what follows a # at a line's beginning do not count.

Rule: no message shows a key, or a part of one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.fields import settings_of
from mlxserver.config.settings import Settings

KEY_FILES = {"api_key_file": "api_key", "admin_key_file": "admin_key"}


def with_key_files(settings: Settings) -> Settings:
    """The settings with the keys of their files among them. Raises ConfigInvalid."""
    for files, keys in KEY_FILES.items():
        found = [key for name in getattr(settings, files) for key in _read(files, Path(name).expanduser(), keys)]
        changed: dict[str, Any] = {keys: tuple(dict.fromkeys((*getattr(settings, keys), *found)))}
        settings = replace(settings, **changed)
    return settings


def _read(setting: str, path: Path, keys: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigInvalid(setting, str(path), f"a file with keys ({reason})") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigInvalid(setting, str(path), "a file with at least one key")
    return list(settings_of(Settings)[keys].check(f"{setting}: {path}", found))
