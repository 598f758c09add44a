"""`mlx-server pull REPO`: a model of the Hugging Face hub, downloaded by a running server, or by this process.

Rule: Ctrl-C stops the download, and what has arrived stays.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from time import monotonic
from typing import Any, Self

from rich import progress
from rich.filesize import decimal

from mlxserver.cli.models import ReadSettings, client_of
from mlxserver.cli.output import print_json
from mlxserver.client.defaults import INTERRUPTED
from mlxserver.client.errors import ServerUnreachable, StreamBroken
from mlxserver.client.models import Planned, Progress, Pulled
from mlxserver.client.views import console, print_status
from mlxserver.config.settings import Settings
from mlxserver.engine.errors import LoadAborted

INTERVAL = 30.0  # seconds between two lines of progress, where there is no terminal
STOPPED = "Stopped. What has arrived stays; the same command downloads the rest."


def pull(options: Namespace, settings: ReadSettings) -> int:
    """Download the model; the exit status. Raises ClientError, EngineError."""
    try:
        with Screen() as screen:
            pulled = asyncio.run(_by_server(options, screen))
    except KeyboardInterrupt:
        print_status(STOPPED)
        return INTERRUPTED
    except ServerUnreachable as error:
        if options.base_url:
            raise
        print_status(f"no server at {error.url}: this command downloads the model itself")
        return _here(options, settings())
    return _conclude(options, pulled.path, dict(pulled.fields))


async def _by_server(options: Namespace, screen: Screen) -> Pulled:
    async with client_of(options) as client, aclosing(client.pull(options.model, force=options.force)) as steps:
        async for step in steps:
            match step:
                case Planned():
                    screen.plan(step)
                case Progress():
                    screen.show(step.stage, int(step.done or 0), int(step.total or 0))
                case Pulled():
                    return step
    raise StreamBroken("the download ended without a result.")


def _here(options: Namespace, settings: Settings) -> int:
    """Download in this process. Raises EngineError."""
    from mlxserver.engine.loading import pull  # here, because they import MLX
    from mlxserver.engine.loading.estimate import estimate

    stopped = threading.Event()
    logging.getLogger("models").addFilter(Once())
    source = pull.source_of(options.model)

    def report(stage: str, done: int, total: int) -> None:
        if stopped.is_set():
            raise LoadAborted(source)
        screen.show(stage, done, total)

    with Screen() as screen:
        plan = pull.plan(source, settings.memory_limit, estimate)
        screen.plan(Planned(plan.source, plan.download_bytes, plan.needed_bytes, plan.fits))
        if not options.force:
            pull.check(plan)
        with _stopping_at_ctrl_c(stopped):
            try:
                path = str(pull.download(plan, report))
            except LoadAborted:
                path = ""
    if not path:
        print_status(STOPPED)
        return INTERRUPTED
    sizes = {"download_bytes": plan.download_bytes, "needed_bytes": plan.needed_bytes, "fits": plan.fits}
    return _conclude(options, path, {"model": source, **sizes, "path": path})


class Once(logging.Filter):
    """Filter that passes each message once: every step of a pull may find that the hub can't be reached."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        is_new = record.getMessage() not in self._passed
        self._passed.add(record.getMessage())
        return is_new


def _conclude(options: Namespace, path: str, fields: dict[str, Any]) -> int:
    if options.json:
        return print_json({name: value for name, value in fields.items() if name != "event"})
    print(path)
    print_status(f"It is in the library, as {fields.get('model')}: a server loads it when a request names it.")
    return 0


class Screen:
    """The plan as a line, and the progress as a bar in a terminal; elsewhere as a line now and then."""

    def __init__(self) -> None:
        terminal = console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=terminal,
            transient=True,
            disable=not terminal.is_terminal,
        )
        self._task: progress.TaskID | None = None
        self._stage = ""
        self._printed_at = monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def plan(self, plan: Planned) -> None:
        """Print what the download takes."""
        if plan.needed_bytes is None:
            memory = "what it needs of memory is not known"
        else:
            fits = "which is there" if plan.fits else "more than models may take"
            memory = f"it needs {decimal(plan.needed_bytes)} of memory, {fits}"
        amount = f"{decimal(plan.download_bytes)} to download" if plan.download_bytes else "nothing to download"
        self._print(f"{plan.model}: {amount}; {memory}")

    def show(self, stage: str, done: int, total: int) -> None:
        """Show a step."""
        if stage != self._stage and stage.startswith("waiting"):
            self._print(stage)
        elif self._bar.disable and total and monotonic() - self._printed_at > INTERVAL:
            self._print(f"{decimal(done)} of {decimal(total)}")
        self._stage = stage
        if self._task is None and total:
            self._task = self._bar.add_task("", total=total, completed=done)
        if self._task is not None:
            self._bar.update(self._task, description=stage.partition(":")[0], completed=done, total=total or None)

    def _print(self, text: str) -> None:
        """Print a line above the bar."""
        self._printed_at = monotonic()
        if self._bar.disable:
            print_status(text)
        else:
            self._bar.console.print(text, style="dim", markup=False, soft_wrap=True)


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
