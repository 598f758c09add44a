"""`mlx-server pull REPO`: a model of the Hugging Face hub, downloaded into the hub's cache.

Rule 1: what it takes on disk and in memory is known, and checked, before the first byte of its weights.
Rule 2: files that are complete when a download ends early stay, and the next one fetches the others.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import progress
from rich.filesize import decimal

from mlxserver.client.command import INTERRUPTED
from mlxserver.client.views import console, print_status
from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.errors import LoadAborted, SourceInvalid
from mlxserver.engine.loading import estimate, hub, sources

SPARE = 1 << 30  # bytes that stay free on the disk


def pull(options: Namespace, settings: Settings) -> int:
    """Download the model. Raises EngineError."""
    source = sources.parse(options.model)
    if not isinstance(source, sources.Repository):
        raise SourceInvalid(options.model, "expected the id of a Hugging Face repository, such as org/name")
    stopped = threading.Event()
    with _stopping_at_ctrl_c(stopped):
        needed = estimate.estimate(ModelSpec(source.id, options.model)).total
        missing = hub.missing_bytes(options.model, source.id, source.revision)
        print_status(f"{options.model}: {decimal(missing)} to download; needs {decimal(needed)} of memory")
        _check(options, settings, needed, missing)
        try:
            path = _download(options, missing, stopped)
        except LoadAborted:
            print_status("Stopped. Files that are complete stay; the same command downloads the rest.")
            return INTERRUPTED
    if options.json:
        print(json.dumps({"model": options.model, "path": str(path), "needed_bytes": needed}, indent=2))
    else:
        print(path)
    return 0


def _check(options: Namespace, settings: Settings, needed: int, missing: int) -> None:
    """Refuse what this machine has no room for. Raises SourceInvalid."""
    cache = hub.cache()
    free = shutil.disk_usage(next(path for path in (cache, *cache.absolute().parents) if path.exists())).free
    if missing and missing + SPARE > free:
        raise SourceInvalid(
            options.model, f"{decimal(missing)} do not fit on the disk of {cache}, {decimal(free)} free"
        )
    budget = estimate.budget(settings.memory_limit)
    if needed > budget and not options.force:
        reason = f"it needs {decimal(needed)} of memory, and models may take {decimal(budget)}; --force downloads it"
        raise SourceInvalid(options.model, reason)


def _download(options: Namespace, missing: int, stopped: threading.Event) -> Path:
    """Download with a bar in a terminal. Raises LoadAborted once it is stopped."""
    columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
    terminal = console(stderr=True)
    with progress.Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("", total=missing or None)

        def report(stage: str, done: int, total: int) -> None:
            if stopped.is_set():
                raise LoadAborted(options.model)
            bar.update(task, completed=done, total=total or None)

        return sources.resolve(options.model, progress=report)


@contextmanager
def _stopping_at_ctrl_c(stopped: threading.Event) -> Iterator[None]:
    """Ctrl-C sets the event; a second one ends the process as it would without this."""

    def on_interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stopped.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
