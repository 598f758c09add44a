"""Folder of the prefix cache on disk: which files it has, when they were used, and how many bytes they may take.

Rule 1: several processes may share the folder: a file that vanishes is not there, one that exists is not written again.
Rule 2: the files of all models are bounded in bytes; those go first that were not used for longest.
Rule 3: what has no name of a file of the prefix cache is left alone.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache.cache_files import FORMAT, PARTIAL, SUFFIX
from mlxserver.engine.kv_cache.disk_index import FileIndex, FileName
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity

_FORMER_SUFFIX = ".kv"  # of format 1
_FORMER_PARTIAL = ".partial"
_INDEXES = 32  # of models, that are kept
_TRUSTED_SECONDS = 5.0  # for which what other processes do in the folder is left unseen while this one writes
_SPARE = 64  # share of the bytes that is freed at once, or a full disk cache would be counted at each write
_STALE_SECONDS = 600  # after which a file that is not whole belongs to a process that has ended


class DiskFiles:
    """Files of all models in one folder, of at most so many bytes. May be used on any thread."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.folder = folder
        self._indexes: dict[str, FileIndex] = {}  # the ones used last at the end
        self._counted = -math.inf  # when the files were counted, by time.monotonic()
        self._nbytes = 0  # of the files, as they were counted, and of those that were written since
        self._lock = threading.Lock()

    def folder_of(self, model: ModelIdentity) -> Path:
        """The folder of a model."""
        return self.folder / _folder_name(model)

    def known_index(self, model: ModelIdentity) -> FileIndex | None:
        """The index of a model's files, if it is up to date. Costs no more than a look at the folder."""
        folder = self.folder_of(model)
        try:
            changed = folder.stat().st_mtime_ns
        except OSError:
            return FileIndex(folder.name)
        with self._lock:
            index = self._indexes.get(folder.name)
        if index and index.is_noted:  # of a change since then, this process is the likely cause: it is writing
            return index if time.monotonic() - index.listed <= _TRUSTED_SECONDS else None
        return index if index and index.changed == changed else None

    def index(self, model: ModelIdentity) -> FileIndex:
        """The index of a model's files, which are listed again if their folder has changed."""
        return self.known_index(model) or self.refreshed_index(model)

    def refreshed_index(self, model: ModelIdentity) -> FileIndex:
        """The index of a model's files, which are listed again."""
        folder = self.folder_of(model)
        try:
            index = FileIndex(folder.name, folder.stat().st_mtime_ns, time.monotonic())
            index.add(path.name for path in folder.iterdir())
        except OSError:
            return FileIndex(folder.name)
        self._keep(index)
        return index

    def _keep(self, index: FileIndex) -> None:
        with self._lock:
            self._indexes.pop(index.model, None)
            self._indexes[index.model] = index
            while len(self._indexes) > _INDEXES:
                del self._indexes[next(iter(self._indexes))]

    def written_index(self, model: ModelIdentity) -> FileIndex:
        """The index for a write: files that other processes wrote since it was listed may be missing."""
        folder = self.folder_of(model)
        with self._lock:
            index = self._indexes.get(folder.name)
        is_recent = index is not None and time.monotonic() - index.listed <= _TRUSTED_SECONDS
        return index if index and is_recent else self.refreshed_index(model)

    def count_written(self, path: Path) -> None:
        """Count a file that this process wrote."""
        with suppress(OSError):
            self._nbytes += path.stat().st_size

    def note_written(self, model: ModelIdentity, names: Sequence[FileName]) -> None:
        """Note files that this process wrote, for prompts to find them, and remove those that are too many."""
        with suppress(OSError):
            changed = self.folder_of(model).stat().st_mtime_ns
            self._keep(self.written_index(model).noted(names, changed))
        if self._nbytes > self.max_bytes or time.monotonic() - self._counted > _TRUSTED_SECONDS:
            self.shrink(self.max_bytes, self.max_bytes // _SPARE)

    def touch(self, model: ModelIdentity, names: Sequence[FileName]) -> None:
        """Note the use of files; of a sequence's, the first ones are the last to go."""
        folder, now = self.folder_of(model), time.time()
        for number, name in enumerate(names):
            with suppress(OSError):
                os.utime(folder / str(name), (now, now - number * 1e-3))

    def usage(self, model: ModelIdentity | None = None) -> tuple[int, int]:
        """Number and bytes of the files, of one model or of all."""
        sizes = [size for _, size, _ in self._files(self.folder_of(model) if model else None)]
        return len(sizes), sum(sizes)

    def shrink(self, max_bytes: int, spare: int = 0) -> None:
        """Remove the least recently used files, if all have more bytes, until they have `spare` bytes less."""
        self._counted, files = time.monotonic(), sorted(self._files())
        self._nbytes = sum(size for _, size, _ in files)
        excess = self._nbytes - max_bytes + spare if self._nbytes > max_bytes else 0
        for _, size, path in files:
            if excess <= 0:
                break
            remove(path)
            excess -= size
            self._nbytes -= size

    def remove_leftovers(self) -> None:
        """Remove files of the former format, and those that were never completed."""
        oldest = time.time() - _STALE_SECONDS
        for path in list(self.folder.rglob("*")):
            if path.name.endswith((PARTIAL, _FORMER_PARTIAL)):
                with suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        remove(path)
            elif path.suffix == _FORMER_SUFFIX and FileName.parse(path.stem + SUFFIX):
                remove(path)
                with suppress(OSError):
                    path.parent.rmdir()  # its last file

    def _files(self, folder: Path | None = None) -> Iterator[tuple[float, int, Path]]:
        """Time of the last use, size and path of each file."""
        for path in (folder or self.folder).rglob(f"*{SUFFIX}"):
            if FileName.parse(path.name):
                with suppress(OSError):
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path


def remove(path: Path) -> None:
    """Remove a file, unless another process has."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


@functools.lru_cache
def _folder_name(model: ModelIdentity) -> str:
    """Hash of all that a model's KV cache depends on, and of the files' format."""
    parts = (model.files, model.adapter, model.weights, model.kv_format, model.share)
    versions = (FORMAT, version("mlx-lm"), str(mx.default_device()))
    return hashlib.sha256(repr((parts, versions)).encode()).hexdigest()[:32]
