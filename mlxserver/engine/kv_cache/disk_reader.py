"""Reading of the prefix cache on disk.

Rule 1: files are read on threads that run no model, several at once, and in order put into arrays of the whole length:
        every value is copied once, and no more is in memory twice than some files.
Rule 2: a file that is damaged, cut off, or not what its name says is removed, and never served.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import cache_files, checkpoints
from mlxserver.engine.kv_cache.cache_files import CacheFileInvalid, StoredPart
from mlxserver.engine.kv_cache.caches import Cache, flat
from mlxserver.engine.kv_cache.disk_files import DiskFiles, remove
from mlxserver.engine.kv_cache.disk_index import FileName, Plan
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, Restored, Tokens
from mlxserver.engine.platform import pinned_memory, streams
from mlxserver.engine.platform.pinned_memory import Buffer

log = logging.getLogger("engine")

_RESTORES = 2  # prefixes that are restored at once
_READERS = min(8, os.cpu_count() or 1)  # threads that read files
_FILES = 4  # that are put in place at once
_AHEAD = _READERS + 1  # such rows that are read, or wait to be put in place

_Read = tuple[FileName, StoredPart]


class DiskReader:
    """Restores prefixes from files. May be called on any thread."""

    def __init__(self, files: DiskFiles) -> None:
        self._files = files
        self._jobs = ThreadPoolExecutor(_RESTORES, "prefix-restore")
        self._is_closed = False

    def restore(
        self, model: ModelIdentity, tokens: Tokens, beyond: int, keep: Callable[[Restored], None]
    ) -> Future[None] | None:
        """Read the longest stored prefix of `tokens` and keep it, if it is longer than `beyond`; None if it is not.

        Nothing is kept if the files turn out to be unusable. Files that have to be listed first are listed later.
        """
        index = self._files.known_index(model)
        plan = index.find(tokens) if index else None
        if plan and plan.length <= beyond:
            return None
        return self._jobs.submit(self._restore, model, tokens, beyond, plan, keep)

    def prepare(self) -> None:
        """Make the buffers that files are read into."""
        if not self._is_closed:
            self._jobs.submit(self._prepare)

    def _prepare(self) -> None:
        with streams.thread_stream():
            pinned_memory.reserve()

    def close(self) -> None:
        """End the threads, once they have read what they are at."""
        self._is_closed = True
        self._jobs.shutdown(wait=False, cancel_futures=True)

    def _restore(
        self, model: ModelIdentity, tokens: Tokens, beyond: int, plan: Plan | None, keep: Callable[[Restored], None]
    ) -> None:
        try:
            started = time.monotonic()
            plan = plan or self._files.index(model).find(tokens)
            if plan.length > beyond:
                with streams.thread_stream():
                    restored = self._read(model, tokens, plan)
                    read = time.monotonic()
                    keep(restored)
                log.info(
                    "prefix cache: %d tokens from %d files, read in %.3f s, kept in %.3f s",
                    plan.length,
                    len(plan.names),
                    read - started,
                    time.monotonic() - read,
                )
        except CancelledError:
            log.debug("prefix cache: a read was given up")
        except (CacheFileInvalid, OSError):
            self._files.refreshed_index(model)
        except Exception:  # a prefix that can't be read is computed
            log.exception("prefix cache: a read failed")

    def _read(self, model: ModelIdentity, tokens: Tokens, plan: Plan) -> Restored:
        folder, blocks = self._files.folder_of(model), Blocks(plan.blocks[-1].end if plan.blocks else 0)
        checkpoint = None
        for row in self._rows(folder, plan.names):
            for name, part in row:
                if name == plan.checkpoint:
                    checkpoint = cache_files.restored(part)
                else:
                    blocks.put(part, name)
            blocks.evaluate()
        lasting = blocks.part() if plan.blocks else None
        mx.eval([leaf for part in (lasting, checkpoint) for leaf in checkpoints.arrays_of(part or [])])
        self._files.touch(model, plan.names)
        return Restored(tokens[: blocks.tokens or plan.length], lasting, tokens[: plan.length], checkpoint)

    def _rows(self, folder: Path, names: Sequence[FileName]) -> Iterator[list[_Read]]:
        """What files have, in their order, some at a time, read ahead. Raises OSError, CacheFileInvalid."""
        rows = [names[start : start + _FILES] for start in range(0, len(names), _FILES)]
        reading = _Reading(folder, rows)
        with ThreadPoolExecutor(_READERS, "prefix-read") as readers:
            try:
                for _ in range(min(_READERS, len(rows))):
                    readers.submit(reading.run)
                for number in range(len(rows)):
                    yield reading.take(number)
                    reading.tickets.release()
                    if self._is_closed:
                        raise CancelledError
            finally:
                reading.stop()


class _Reading:
    """Rows of files that several threads read, _AHEAD of the one that is waited for at the most."""

    def __init__(self, folder: Path, rows: Sequence[Sequence[FileName]]) -> None:
        self._results: dict[int, Future[list[_Read]]] = {number: Future() for number in range(len(rows))}
        self.tickets = threading.Semaphore(_AHEAD)
        self._folder, self._rows = folder, rows
        self._numbers = iter(range(len(rows)))
        self._is_stopped = False

    def take(self, number: int) -> list[_Read]:
        """Wait for a row, which is not held here any longer. Raises OSError, CacheFileInvalid."""
        row = self._results[number].result()
        del self._results[number]
        return row

    def run(self) -> None:
        """Read one row after another, on a stream and through a buffer of the calling thread's own."""
        try:
            with streams.thread_stream(), pinned_memory.borrowed() as buffer:
                while self.tickets.acquire() and not self._is_stopped:
                    if (number := next(self._numbers, None)) is None:
                        break
                    row = [(name, _read(self._folder / str(name), buffer)) for name in self._rows[number]]
                    self._results[number].set_result(row)
                    del row
        except BaseException as error:  # which all that wait for a row have to see
            for result in list(self._results.values()):
                with suppress(InvalidStateError):
                    result.set_exception(error)

    def stop(self) -> None:
        """End the threads, once they have read what they are at."""
        self._is_stopped = True
        self.tickets.release(_READERS)


class Blocks:
    """Layers that keep all tokens, so many of them: put together from blocks, stack by stack."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._stored: StoredPart | None = None

    def put(self, block: StoredPart, name: FileName) -> None:
        """Put a block in its place, the first one first. evaluate() after some of them."""
        if (stored := self._stored) is None:
            shapes = [(*stack.shape[:3], self.tokens, *stack.shape[4:]) for stack in block.stacks]
            stacks = [mx.zeros(shape, stack.dtype) for shape, stack in zip(shapes, block.stacks, strict=True)]
            stored = self._stored = StoredPart(block.structure, block.members, stacks)
        for whole, stack in zip(stored.stacks, block.stacks, strict=True):
            whole[:, :, :, name.start : name.end] = stack

    def evaluate(self) -> None:
        """Copy the blocks, so that their own memory can go."""
        if self._stored:
            mx.eval(self._stored.stacks)

    def part(self) -> Cache:
        """The layers."""
        assert self._stored
        cache = cache_files.restored(self._stored)
        for layer in flat(cache):
            if layer is not None and layer.keys is not None:
                layer.offset = self.tokens
        return cache


def _read(path: Path, buffer: Buffer | None) -> StoredPart:
    try:
        return cache_files.read(path, buffer)
    except CacheFileInvalid:
        log.warning("A file of the prefix cache is damaged, and is removed: %s", path.name)
        remove(path)
        raise
