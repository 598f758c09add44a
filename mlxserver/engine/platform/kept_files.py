"""Small JSON files between loads and processes, which share their directory.

Rule: a file is written whole or not at all. What can't be read is not there; what can't be written is not kept.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger("engine")

T = TypeVar("T")


class KeptFiles:
    """Files of a directory, each with a name of its own.

    most: files, of some hundred bytes each; those of other versions are never looked for again.
    """

    def __init__(self, directory: Path, most: int = 256) -> None:
        self._directory = directory
        self._most = most

    def read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        """What a file has; None if there is none, or parse() raises ValueError, KeyError or TypeError."""
        return _read(self._file(name), parse)

    def read_all(self, parse: Callable[[bytes], T]) -> Iterator[T]:
        """What the files have, the latest first."""
        try:
            files = sorted(self._directory.glob("*.json"), key=_changed, reverse=True)
        except OSError:
            return
        yield from (content for file in files if (content := _read(file, parse)) is not None)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep an object, in place of an earlier one."""
        try:
            write_whole(self._file(name), json.dumps(content).encode())
            self._drop_oldest()
        except OSError as error:
            log.debug("%s is not kept: %s", self._file(name), error)

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _drop_oldest(self) -> None:
        files = list(self._directory.iterdir())
        for file in sorted(files, key=_changed)[: max(0, len(files) - self._most)]:
            file.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, in place of an earlier one, whole or not at all. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
        written = Path(part.name)
        try:
            part.write(content)
            part.flush()
            os.fsync(part.fileno())
            written.replace(file)
        except BaseException:
            written.unlink(missing_ok=True)
            raise


def _read(file: Path, parse: Callable[[bytes], T]) -> T | None:
    try:
        return parse(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.debug("%s is left out: %s", file, error)
        return None


def _changed(file: Path) -> float:
    """Time of a file's last change; the earliest if it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
