"""Writing of the prefix cache on disk.

Rule 1: files are written on a thread of their own, in blocks, and without Python's lock, which the engine threads need;
        for as long as a block takes, a pause follows, so that few steps of the engines wait for one.
Rule 2: a disk that fails or is full costs the files, a line in the log, and nothing else.
Rule 3: what has NaN or inf in it is not written.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import cache_files, checkpoints
from mlxserver.engine.kv_cache.cache_files import NotStorable
from mlxserver.engine.kv_cache.caches import Cache
from mlxserver.engine.kv_cache.disk_files import DiskFiles
from mlxserver.engine.kv_cache.disk_index import ALONE, BESIDE, STATE, WHOLE, Digests, FileName
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, Tokens
from mlxserver.engine.platform import pinned_memory, streams

log = logging.getLogger("engine")

_LEAST = 32  # tokens that are worth a file
_LONGEST_PAUSE = 0.02  # seconds
_PENDING = 64  # writes that may wait, most, and
_PENDING_BYTES = 1 << 30  # what they may hold in memory, beyond the one under way; what comes then is not written


@dataclass(frozen=True)
class _Write:
    """Parts of the cache of exactly these tokens, to be written."""

    model: ModelIdentity
    tokens: Tokens
    lasting: Cache | None
    checkpoint: Cache | None
    nbytes: int


class DiskWriter:
    """Writes parts of KV caches, layers that keep all tokens in blocks of so many. May be called on any thread."""

    def __init__(self, files: DiskFiles, block: int) -> None:
        self._files = files
        self._block = block
        self._is_failing = False
        self._is_closing = threading.Event()
        self._writes: queue.Queue[_Write | None] = queue.Queue(_PENDING)
        self._pending_bytes = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="prefix-writer", daemon=True)
        self._thread.start()

    def store(self, model: ModelIdentity, tokens: Tokens, lasting: Cache | None, checkpoint: Cache | None) -> None:
        """Write, sooner or later, the layers that keep all tokens of a sequence, and a checkpoint of the others."""
        if len(tokens) < _LEAST:
            return
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

    def drop_pending(self) -> None:
        """Drop what waits to be written. Waits for a write under way."""
        with suppress(queue.Empty):
            while True:
                if write := self._writes.get_nowait():
                    self._note_done(write)
                self._writes.task_done()
        self._writes.join()

    def close(self, timeout: float) -> None:
        """Write what is pending, for some seconds, and end the thread."""
        self._is_closing.set()
        with suppress(queue.Full):
            self._writes.put(None, timeout=timeout)
            self._thread.join(timeout)

    def _run(self) -> None:
        with suppress(OSError):
            self._files.remove_leftovers()
        while write := self._writes.get():
            try:
                self._attempt(write)
            finally:
                self._note_done(write)
                del write
                self._writes.task_done()
        self._writes.task_done()

    def _attempt(self, write: _Write) -> None:
        try:
            with streams.thread_stream():
                self._write(write)
            self._is_failing = False
        except NotStorable as error:
            log.debug("prefix cache: %s is not written to disk", error)
        except OSError as error:
            if not self._is_failing:
                folder = self._files.folder
                log.warning("The prefix cache can't be written to %s, and stays in memory: %s", folder, error)
            self._is_failing = True
        except Exception:  # the thread must not end
            log.exception("prefix cache: a write failed")

    def _note_done(self, write: _Write) -> None:
        with self._lock:
            self._pending_bytes -= write.nbytes

    def _write(self, write: _Write) -> None:
        folder = self._files.folder_of(write.model)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not all(checkpoints.is_sound(part) for part in (write.lasting, write.checkpoint) if part):
            return
        found = self._files.written_index(write.model).checkpoints(write.tokens, len(write.tokens))
        written = [*self._write_checkpoint(write, folder), *self._write_blocks(write, folder, found)]
        self._files.touch(write.model, [*written, *(name for name in found if name not in written)])
        self._files.note_written(write.model, written)

    def _write_checkpoint(self, write: _Write, folder: Path) -> list[FileName]:
        if (checkpoint := write.checkpoint) is None:
            return []
        end = len(write.tokens)
        kind = ALONE if checkpoints.is_whole(checkpoint) else STATE
        name = FileName(kind, 0, end, Digests(folder.name, write.tokens).at(end))
        self._write_file(folder / str(name), lambda: checkpoint)
        return [name]

    def _write_blocks(self, write: _Write, folder: Path, found: Sequence[FileName]) -> list[FileName]:
        """Write the blocks, which end at multiples of their size, and where there is a checkpoint to go on from."""
        names: list[FileName] = []
        if (lasting := write.lasting) is None or checkpoints.is_empty(lasting):
            return names
        kind = WHOLE if checkpoints.is_whole(lasting) else BESIDE
        digests, start, length = Digests(folder.name, write.tokens), 0, len(write.tokens)
        for end in sorted({*range(self._block, length, self._block), *(each.end for each in found), length}):
            names.append(name := FileName(kind, start, end, digests.at(end)))
            self._write_file(folder / str(name), functools.partial(checkpoints.cut_out, lasting, start, end))
            start = end
        return names

    def _write_file(self, path: Path, part: Callable[[], Cache]) -> None:
        """Write a file that does not exist yet, and pause."""
        if path.exists():
            return
        started = time.monotonic()
        with pinned_memory.borrowed() as buffer:
            cache_files.write(path, part(), buffer)
        self._files.count_written(path)
        self._is_closing.wait(min(_LONGEST_PAUSE, time.monotonic() - started))
