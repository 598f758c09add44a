"""Prefix cache on disk, behind the one in memory: it survives unloads, evictions, restarts and crashes.

Layers that keep all tokens are stored in blocks of tokens, checkpoints whole; a conversation that grows adds blocks.
A file's name has a hash of the model and of all tokens up to its end (kv_cache/disk_index.py), so that a prompt finds
what it shares with any other, and a file never has to change.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from mlxserver.engine.kv_cache.caches import Cache
from mlxserver.engine.kv_cache.disk_files import DiskFiles
from mlxserver.engine.kv_cache.disk_reader import DiskReader
from mlxserver.engine.kv_cache.disk_writer import DiskWriter
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, Restored, Tokens

BLOCK = 128  # tokens; a prompt that ends or differs inside a block finds nothing of it


class DiskTier:
    """Files of all models in one folder, of at most so many bytes. May be called on any thread."""

    def __init__(self, folder: Path, max_bytes: int, block: int = BLOCK) -> None:
        self.files = DiskFiles(folder, max_bytes)
        self._writer = DiskWriter(self.files, block)
        self._reader = DiskReader(self.files)

    def store(self, model: ModelIdentity, tokens: Tokens, lasting: Cache | None, checkpoint: Cache | None) -> None:
        """Write, sooner or later, the layers that keep all tokens of a sequence, and a checkpoint of the others."""
        self._writer.store(model, tokens, lasting, checkpoint)

    def restore(
        self, model: ModelIdentity, tokens: Tokens, beyond: int, keep: Callable[[Restored], None]
    ) -> Future[None] | None:
        """Read the longest stored prefix of `tokens` and keep it, if it is longer than `beyond`; None if it is not."""
        return self._reader.restore(model, tokens, beyond, keep)

    def prepare(self) -> None:
        """Make the buffers that files are read into."""
        self._reader.prepare()

    def usage(self, model: ModelIdentity | None = None) -> tuple[int, int]:
        """Number and bytes of the files, of one model or of all."""
        return self.files.usage(model)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._writer.flush()

    def clear(self) -> None:
        """Remove all files, and what waits to be written. Waits for a write under way."""
        self._writer.drop_pending()
        self.files.shrink(0)

    def close(self, timeout: float = 5.0) -> None:
        """Write what is pending, for some seconds, and end the threads."""
        self._writer.close(timeout)
        self._reader.close()
