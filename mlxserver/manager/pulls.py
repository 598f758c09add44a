"""Pulls of models that run in this process.

Invariants
1. Requests to pull the same are one pull: those that come later follow it.
2. A pull ends with the last request that follows it, and when the server stops.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.errors import LoadAborted
from mlxserver.engine.loading.estimate import Estimate
from mlxserver.engine.loading.pull import Plan, check, download, plan
from mlxserver.manager.library import Library
from mlxserver.manager.states import LoadProgress
from mlxserver.manager.tasks import Tasks

AT_ONCE = 2  # pulls; each fetches several files

Step = Plan | LoadProgress
OnStep = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model that was pulled. path: its directory."""

    plan: Plan
    path: Path


@dataclass(eq=False, slots=True)
class _Pull:
    """A pull under way: its plan once it is known, and its latest progress."""

    task: asyncio.Task[Pulled] | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    followers: list[OnStep] = field(default_factory=list)
    plan: Plan | None = None
    latest: LoadProgress | None = None

    def note(self, step: Step) -> None:
        """Report a step to all followers."""
        if isinstance(step, Plan):
            self.plan = step
        else:
            self.latest = step
        for follower in [*self.followers]:
            follower(step)


class Pulls:
    """Pulls by source, and whether they are forced. Used on one event loop."""

    def __init__(
        self,
        library: Library,
        settings: Callable[[], Settings],
        estimate: Callable[[ModelSpec], Estimate],
        tasks: Tasks,
    ) -> None:
        self._library = library
        self._settings = settings
        self._estimate = estimate
        self._tasks = tasks
        self._running: dict[tuple[str, bool], _Pull] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def pull(self, source: str, on_step: OnStep = lambda step: None, *, force: bool = False) -> Pulled:
        """Pull a model, or follow the pull of it that runs; when this is cancelled, and nothing else follows, it stops.

        force: although memory is too small for it.

        Raises:
            SourceInvalid, HubUnavailable, DiskFull, TooLarge, LoadAborted
        """
        key = source, force
        pull = self._running.get(key) or self._start(key)
        assert pull.task
        pull.followers.append(on_step)
        for step in (pull.plan, pull.latest):
            if step:
                on_step(step)
        try:
            return await asyncio.shield(pull.task)
        finally:
            pull.followers.remove(on_step)
            if not pull.followers:
                self._stop(key, pull)

    def stop(self) -> None:
        """Stop all of them."""
        for key, pull in [*self._running.items()]:
            self._stop(key, pull)

    def _start(self, key: tuple[str, bool]) -> _Pull:
        pull = self._running[key] = _Pull()
        pull.task = self._tasks.keep(self._run(key, pull))
        return pull

    def _stop(self, key: tuple[str, bool], pull: _Pull) -> None:
        pull.stopped.set()
        if self._running.get(key) is pull:
            del self._running[key]

    async def _run(self, key: tuple[str, bool], pull: _Pull) -> Pulled:
        try:
            async with self._slots:
                pulled = await asyncio.to_thread(self._work, *key, pull, asyncio.get_running_loop())
            await self._library.refresh()
            return pulled
        finally:
            self._stop(key, pull)

    def _work(self, source: str, force: bool, pull: _Pull, loop: asyncio.AbstractEventLoop) -> Pulled:
        def note(step: Step) -> None:
            if pull.stopped.is_set():
                raise LoadAborted(source)
            loop.call_soon_threadsafe(pull.note, step)

        found = plan(source, self._settings().memory_limit, self._estimate)
        note(found)
        if not force:
            check(found)
        return Pulled(found, download(found, lambda *progress: note(LoadProgress(*progress))))
