"""Download of a manifest's files, several at once.

Rule 1: the snapshot and the reference to it are made when all files are complete: what is being downloaded is no model,
        and a model that is being updated stays what it was.
Rule 2: progress is what the disk has, whichever process brings it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from huggingface_hub import errors
from rich.filesize import decimal

from mlxserver.engine.loading.download import transfer
from mlxserver.engine.loading.download.manifest import Manifest, RemoteFile, read_manifest
from mlxserver.engine.loading.download.transfer import BUSY, Stopped, asked_delay, fetch

AT_ONCE = 4  # files
INTERVAL = 0.1  # seconds between two reports
PATIENCE = 2.0  # seconds that transfers get to end when they are stopped
SPARE = 1 << 30  # bytes that stay free on the disk

Report = Callable[[str, int, int], None]  # stage, bytes that are done, all bytes


class NoSpace(Exception):
    """The files do not fit on the disk."""

    def __init__(self, missing: int, cache: Path, free: int) -> None:
        room = f"{decimal(free)} free, of which {decimal(SPARE)} stay free"
        super().__init__(f"{decimal(missing)} do not fit on the disk of {cache}, {room}")


class Download:
    """One download; run() may be called once."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._missing = sorted(manifest.missing, key=lambda file: file.size, reverse=True)
        self._total = sum(file.size for file in self._missing)
        self._stopped = threading.Event()
        self._pauses: dict[RemoteFile, str] = {}  # of the transfers under way; "" of those that receive
        self._errors: list[Exception] = []

    def run(self, report: Report) -> Path:
        """The snapshot, once it is complete. Blocks; what `report` raises stops it.

        Raises:
            NoSpace, DigestWrong, OSError, and what huggingface_hub raises
        """
        check_disk(self._manifest)
        queue = iter(self._missing)
        lock = threading.Lock()
        threads = [threading.Thread(target=self._work, args=(queue, lock), daemon=True) for _ in range(AT_ONCE)]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                report(self._stage, sum(map(self._manifest.bytes_on_disk, self._missing)), self._total)
                next((thread for thread in threads if thread.is_alive()), threads[0]).join(INTERVAL)
        finally:
            self._stop(threads)
        if self._errors:
            raise self._errors[0]
        self._manifest.link_all()
        report("downloading", self._total, self._total)
        return self._manifest.snapshot

    @property
    def _stage(self) -> str:
        """What all transfers wait for, if each of them waits."""
        pauses = [*self._pauses.values()]
        return f"waiting: {pauses[0]}" if pauses and all(pauses) else "downloading"

    def _work(self, queue: Iterator[RemoteFile], lock: threading.Lock) -> None:
        """Fetch files of the queue until it is empty or something fails."""
        while not self._stopped.is_set():
            with lock:
                file = next(queue, None)
            if file is None:
                return
            try:
                fetch(self._manifest, file, partial(self._pause, file))
            except Stopped:
                return
            except Exception as error:
                self._errors.append(error)
                self._stopped.set()
            finally:
                self._pauses.pop(file, None)

    def _pause(self, file: RemoteFile, reason: str, seconds: float) -> None:
        self._pauses[file] = reason
        if self._stopped.wait(seconds):
            raise Stopped

    def _stop(self, threads: list[threading.Thread]) -> None:
        self._stopped.set()
        end = time.monotonic() + PATIENCE
        for thread in threads:
            if thread.ident:
                thread.join(max(0.0, end - time.monotonic()))


def fetch_now(manifest: Manifest, file: RemoteFile) -> Path:
    """A small file's content in the cache, fetched if need be. Blocks. Raises as Download.run() does."""
    if not manifest.has(file):
        fetch(manifest, file, lambda reason, seconds: time.sleep(min(seconds, transfer.DELAYS[-1])))  # can't be stopped
    return next(path for path in (manifest.link(file), manifest.blob(file)) if path.is_file())


def list_files(repository: str, revision: str | None) -> Manifest:
    """The manifest; a hub that is busy is asked again. Raises what huggingface_hub raises."""
    for delay in transfer.DELAYS[:2]:
        try:
            return read_manifest(repository, revision)
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise
            asked = asked_delay(error.response)
            time.sleep(min(delay if asked is None else asked, transfer.DELAYS[-1]))
    return read_manifest(repository, revision)


def check_disk(manifest: Manifest) -> None:
    """Raises NoSpace if what is missing does not fit."""
    cache, missing = manifest.cache, manifest.missing_bytes
    free = shutil.disk_usage(next(path for path in (cache, *cache.absolute().parents) if path.exists())).free
    if missing and missing + SPARE > free:
        raise NoSpace(missing, cache, free)
