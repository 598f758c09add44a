"""Prefix cache on disk, behind the one in memory: it survives unloads, evictions, restarts and crashes.

Layers that keep all tokens are stored in blocks of tokens, checkpoints whole; a conversation that grows adds blocks.
A file's name has a hash of the model and of all tokens up to its end (kv_cache/disk_index.py), so that a prompt finds
what it shares with any other, and a file never has to change.

Rule 1: files are written on a thread of their own, and read on threads that run no model.
Rule 2: several processes may share the folder: a file that vanishes is not there, one that exists is not written again.
Rule 3: a file that is damaged, cut off, or not what its name says is removed, and never served.
        What has NaN or inf in it is not written.
Rule 4: a disk that fails or is full costs the files, a line in the log, and nothing else.
Rule 5: the files of all models are bounded in bytes; those go first that were not used for longest.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import cache_files, checkpoints
from mlxserver.engine.kv_cache.cache_files import FORMAT, PARTIAL, SUFFIX, CacheFileInvalid, NotStorable, StoredPart
from mlxserver.engine.kv_cache.caches import Cache
from mlxserver.engine.kv_cache.disk_index import ALONE, BESIDE, STATE, WHOLE, Digests, FileIndex, FileName, Plan
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, Restored, Tokens
from mlxserver.engine.platform import streams

log = logging.getLogger("engine")

BLOCK = 128  # tokens; a prompt that ends or differs inside a block finds nothing of it
_LEAST = 32  # tokens that are worth a file
_READERS = 8  # files that are read at once
_PENDING = 64  # writes that may wait, most, and
_PENDING_BYTES = 1 << 30  # what they may hold in memory, beyond the one under way; what comes then is not written
_STALE_SECONDS = 600  # after which a file that is not whole belongs to a process that has ended


@dataclass(frozen=True)
class _Write:
    """Parts of the cache of exactly these tokens, to be written."""

    model: ModelIdentity
    tokens: Tokens
    lasting: Cache | None
    checkpoint: Cache | None
    nbytes: int


class DiskTier:
    """Files of all models in one folder, of at most so many bytes. May be called on any thread."""

    def __init__(self, folder: Path, max_bytes: int, block: int = BLOCK) -> None:
        self.max_bytes = max_bytes
        self._block = block
        self._folder = folder
        self._indexes: dict[str, FileIndex] = {}
        self._lock = threading.Lock()
        self._is_failing = False
        self._writes: queue.Queue[_Write | None] = queue.Queue(_PENDING)
        self._pending_bytes = 0
        self._jobs = ThreadPoolExecutor(2, "prefix-restore")
        self._readers = ThreadPoolExecutor(_READERS, "prefix-read")
        self._writer = threading.Thread(target=self._write_all, name="prefix-writer", daemon=True)
        self._writer.start()

    # -- writing --------------------------------------------------------------------------------------------------

    def store(self, model: ModelIdentity, tokens: Tokens, lasting: Cache | None, checkpoint: Cache | None) -> None:
        """Write, sooner or later, the layers that keep all tokens of a sequence, and a checkpoint of the others."""
        if len(tokens) >= _LEAST:
            arrays = [leaf for part in (lasting, checkpoint) for leaf in checkpoints.arrays_of(part or [])]
            write = _Write(model, tokens, lasting, checkpoint, sum(array.nbytes for array in arrays))
            with self._lock:
                if self._pending_bytes and self._pending_bytes + write.nbytes > _PENDING_BYTES:
                    return
                self._pending_bytes += write.nbytes
            mx.async_eval(arrays)  # type: ignore[no-untyped-call]
            try:
                self._writes.put_nowait(write)
            except queue.Full:
                self._note_done(write)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._writes.join()

    def close(self, timeout: float = 5.0) -> None:
        """Write what is pending, for some seconds, and end the threads."""
        with suppress(queue.Full):
            self._writes.put(None, timeout=timeout)
            self._writer.join(timeout)
        self._jobs.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _write_all(self) -> None:
        self._remove(self._leftovers())
        while write := self._writes.get():
            try:
                with streams.thread_stream():
                    self._write(write.model, write.tokens, write.lasting, write.checkpoint)
                self._shrink(self.max_bytes)
                self._is_failing = False
            except NotStorable as error:
                log.debug("prefix cache: %s is not written to disk", error)
            except OSError as error:
                if not self._is_failing:
                    log.warning("The prefix cache can't be written to %s, and stays in memory: %s", self._folder, error)
                self._is_failing = True
            except Exception:  # the thread must not end
                log.exception("prefix cache: a write failed")
            finally:
                self._note_done(write)
                del write
                self._writes.task_done()
        self._writes.task_done()

    def _note_done(self, write: _Write) -> None:
        with self._lock:
            self._pending_bytes -= write.nbytes

    def _write(self, model: ModelIdentity, tokens: Tokens, lasting: Cache | None, checkpoint: Cache | None) -> None:
        folder = self._folder_of(model)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        written: list[FileName] = []
        if not all(checkpoints.is_sound(part) for part in (lasting, checkpoint) if part):
            return
        if checkpoint is not None:
            kind = ALONE if checkpoints.is_whole(checkpoint) else STATE
            name = FileName(kind, 0, len(tokens), Digests(folder.name, tokens).at(len(tokens)))
            written.append(name)
            if not (folder / str(name)).exists():
                cache_files.write(folder / str(name), checkpoint)
        if lasting is not None and not checkpoints.is_empty(lasting):
            kind = WHOLE if checkpoints.is_whole(lasting) else BESIDE
            digests, start = Digests(folder.name, tokens), 0
            for end in self._cuts(model, tokens):
                name = FileName(kind, start, end, digests.at(end))
                written.append(name)
                if not (folder / str(name)).exists():
                    cache_files.write(folder / str(name), checkpoints.cut_out(lasting, start, end))
                start = end
        self._touch(folder, [*written, *self._index(model).checkpoints(tokens, len(tokens))])
        with self._lock:
            self._indexes.pop(folder.name, None)

    def _cuts(self, model: ModelIdentity, tokens: Tokens) -> list[int]:
        """Where blocks end: at multiples of their size, and where there is a checkpoint to be gone on from."""
        found = {name.end for name in self._index(model).checkpoints(tokens, len(tokens))}
        return sorted({*range(self._block, len(tokens), self._block), *found, len(tokens)})

    # -- reading --------------------------------------------------------------------------------------------------

    def restore(
        self, model: ModelIdentity, tokens: Tokens, beyond: int, keep: Callable[[Restored], None]
    ) -> Future[None] | None:
        """Read the longest stored prefix of `tokens` and keep it, if it is longer than `beyond`; None if it is not.

        Nothing is kept if the files turn out to be unusable.
        """
        if (plan := self._index(model).find(tokens)).length <= beyond:
            return None
        return self._jobs.submit(self._restore, model, tokens, plan, keep)

    def _restore(self, model: ModelIdentity, tokens: Tokens, plan: Plan, keep: Callable[[Restored], None]) -> None:
        try:
            with streams.thread_stream():
                if restored := self._read(model, tokens, plan):
                    keep(restored)
        except Exception:  # a prefix that can't be read is computed
            log.exception("prefix cache: a read failed")

    def _read(self, model: ModelIdentity, tokens: Tokens, plan: Plan) -> Restored | None:
        folder = self._folder_of(model)
        read = dict(zip(plan.names, self._readers.map(lambda name: _read(folder / str(name)), plan.names), strict=True))
        if any(part is None for part in read.values()):
            with self._lock:
                self._indexes.pop(folder.name, None)
            return None
        parts = {name: cache_files.restored(part) for name, part in read.items() if part is not None}
        lasting = checkpoints.put_together([parts[name] for name in plan.blocks]) if plan.blocks else None
        checkpoint = parts[plan.checkpoint] if plan.checkpoint else None
        mx.eval([leaf for part in (lasting, checkpoint) for leaf in checkpoints.arrays_of(part or [])])
        self._touch(folder, plan.names)
        covered = plan.blocks[-1].end if plan.blocks else plan.length
        return Restored(tokens[:covered], lasting, tokens[: plan.length], checkpoint)

    def _index(self, model: ModelIdentity) -> FileIndex:
        """The files of a model, read again if its folder has changed."""
        folder = self._folder_of(model)
        try:
            changed = folder.stat().st_mtime_ns
            with self._lock:
                if (index := self._indexes.get(folder.name)) and index.changed == changed:
                    return index
            index = FileIndex(folder.name, changed)
            index.add(path.name for path in folder.iterdir())
        except OSError:
            return FileIndex(folder.name)
        with self._lock:
            self._indexes[folder.name] = index
        return index

    # -- files ----------------------------------------------------------------------------------------------------

    def usage(self, model: ModelIdentity | None = None) -> tuple[int, int]:
        """Number and bytes of the files, of one model or of all."""
        sizes = [size for _, size, _ in self._files(self._folder_of(model) if model else None)]
        return len(sizes), sum(sizes)

    def clear(self) -> None:
        """Remove all files, and what waits to be written. Waits for a write under way."""
        with suppress(queue.Empty):
            while True:
                if write := self._writes.get_nowait():
                    self._note_done(write)
                self._writes.task_done()
        self._writes.join()
        self._shrink(0)

    def _shrink(self, max_bytes: int) -> None:
        """Remove the least recently used files until at most this many bytes are left."""
        files = sorted(self._files())
        excess = sum(size for _, size, _ in files) - max_bytes
        gone = []
        for _, size, path in files:
            if excess <= 0:
                break
            gone.append(path)
            excess -= size
        self._remove(gone)

    def _remove(self, paths: Sequence[Path]) -> None:
        if not paths:
            return
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        with self._lock:
            self._indexes.clear()

    def _files(self, folder: Path | None = None) -> Iterator[tuple[float, int, Path]]:
        """Time of the last use, size and path of each file."""
        for path in (folder or self._folder).rglob(f"*{SUFFIX}"):
            with suppress(OSError):
                status = path.stat()
                yield status.st_mtime, status.st_size, path

    def _leftovers(self) -> list[Path]:
        """Files that were never completed."""
        found = []
        for path in self._folder.rglob(f"*{PARTIAL}"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                    found.append(path)
        return found

    def _touch(self, folder: Path, names: Sequence[FileName]) -> None:
        """Note the use of files; of a sequence's, the first ones are the last to go."""
        now = time.time()
        for n, name in enumerate(names):
            with suppress(OSError):
                os.utime(folder / str(name), (now, now - n * 1e-3))

    def _folder_of(self, model: ModelIdentity) -> Path:
        """The folder of a model."""
        return self._folder / _folder_name(model)


@functools.lru_cache
def _folder_name(model: ModelIdentity) -> str:
    """Hash of all that a model's KV cache depends on, and of the files' format."""
    parts = (model.files, model.adapter, model.weights, model.kv_format, model.share)
    versions = (FORMAT, version("mlx-lm"), str(mx.default_device()))
    return hashlib.sha256(repr((parts, versions)).encode()).hexdigest()[:32]


def _read(path: Path) -> StoredPart | None:
    """What a file has; None if it can't be used. A damaged one is removed."""
    try:
        return cache_files.read(path)
    except CacheFileInvalid:
        log.warning("A file of the prefix cache is damaged, and is removed: %s", path.name)
        with suppress(OSError):
            path.unlink(missing_ok=True)
    except OSError:
        pass
    return None
