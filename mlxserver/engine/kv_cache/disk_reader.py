"""Reading of the prefix cache on disk.

Rule 1: files are read on threads that run no model, several at once, and in order put into arrays of the whole length.
Rule 2: a file that is damaged, cut off, or not what its name says is removed, and never served.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import cache_files, checkpoints
from mlxserver.engine.kv_cache.cache_files import CacheFileInvalid, StoredPart
from mlxserver.engine.kv_cache.caches import Cache, flat
from mlxserver.engine.kv_cache.disk_files import DiskFiles, remove
from mlxserver.engine.kv_cache.disk_index import FileName, Plan
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, Restored, Tokens
from mlxserver.engine.platform import streams

log = logging.getLogger("engine")

_RESTORES = 2  # prefixes that are restored at once
_READERS = min(8, os.cpu_count() or 1)  # threads that read files
_FILES = 4  # that one of them reads in a row, on one stream
_AHEAD = _READERS + 1  # such rows that are read, or wait to be put in place


class DiskReader:
    """Restores prefixes from files. May be called on any thread."""

    def __init__(self, files: DiskFiles) -> None:
        self._files = files
        self._jobs = ThreadPoolExecutor(_RESTORES, "prefix-restore")
        self._readers = ThreadPoolExecutor(_READERS, "prefix-read")

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

    def close(self) -> None:
        """End the threads, once they have read what they are at."""
        self._jobs.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _restore(
        self, model: ModelIdentity, tokens: Tokens, beyond: int, plan: Plan | None, keep: Callable[[Restored], None]
    ) -> None:
        try:
            plan = plan or self._files.index(model).find(tokens)
            if plan.length > beyond:
                with streams.thread_stream():
                    keep(self._read(model, tokens, plan))
        except (CacheFileInvalid, OSError):
            self._files.refreshed_index(model)
        except Exception:  # a prefix that can't be read is computed
            log.exception("prefix cache: a read failed")

    def _read(self, model: ModelIdentity, tokens: Tokens, plan: Plan) -> Restored:
        folder, blocks = self._files.folder_of(model), Blocks(plan.blocks[-1].end if plan.blocks else 0)
        checkpoint = None
        for name, part in zip(plan.names, self._parts(folder, plan.names), strict=True):
            if name == plan.checkpoint:
                checkpoint = cache_files.restored(part)
            else:
                blocks.put(part, name)
        lasting = blocks.part() if plan.blocks else None
        mx.eval([leaf for part in (lasting, checkpoint) for leaf in checkpoints.arrays_of(part or [])])
        self._files.touch(model, plan.names)
        return Restored(tokens[: blocks.tokens or plan.length], lasting, tokens[: plan.length], checkpoint)

    def _parts(self, folder: Path, names: Sequence[FileName]) -> Iterator[StoredPart]:
        """What files have, in their order, read ahead. Raises OSError, CacheFileInvalid."""
        rows = iter([names[start : start + _FILES] for start in range(0, len(names), _FILES)])
        pending = deque(
            self._readers.submit(_read_all, folder, row) for _, row in zip(range(_AHEAD), rows, strict=False)
        )
        try:
            while pending:
                parts = pending.popleft().result()
                if row := next(rows, None):
                    pending.append(self._readers.submit(_read_all, folder, row))
                yield from parts
        finally:
            for future in pending:
                future.cancel()


class Blocks:
    """Layers that keep all tokens, so many of them: put together from blocks, stack by stack."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._stored: StoredPart | None = None

    def put(self, block: StoredPart, name: FileName) -> None:
        """Put a block in its place, the first one first."""
        if (stored := self._stored) is None:
            shapes = [(*stack.shape[:3], self.tokens, *stack.shape[4:]) for stack in block.stacks]
            stacks = [mx.zeros(shape, stack.dtype) for shape, stack in zip(shapes, block.stacks, strict=True)]
            stored = self._stored = StoredPart(block.structure, block.members, stacks)
        for whole, stack in zip(stored.stacks, block.stacks, strict=True):
            whole[:, :, :, name.start : name.end] = stack
        mx.eval(stored.stacks)

    def part(self) -> Cache:
        """The layers."""
        assert self._stored
        cache = cache_files.restored(self._stored)
        for layer in flat(cache):
            if layer is not None and layer.keys is not None:
                layer.offset = self.tokens
        return cache


def _read_all(folder: Path, names: Sequence[FileName]) -> list[StoredPart]:
    with streams.thread_stream():
        return [_read(folder / str(name)) for name in names]


def _read(path: Path) -> StoredPart:
    try:
        return cache_files.read(path)
    except CacheFileInvalid:
        log.warning("A file of the prefix cache is damaged, and is removed: %s", path.name)
        remove(path)
        raise
