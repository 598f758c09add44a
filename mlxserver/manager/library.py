"""Library of the manager: the models of this machine that a request may name although they are not registered.

Invariants
1. A scan runs on a thread of its own, one at a time, and never fails a request or the start.
2. Answers use what the last scan has found; a scan that is out of date is repeated in the background.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from mlxserver.config.settings import Settings
from mlxserver.engine.loading.library.scan import LocalModel, Scan

log = logging.getLogger("models")

FRESH = 10.0  # seconds for which a scan is up to date


class Library:
    """Models on this machine. Used on one event loop.

    scan: searches the folders; None: there are none. settings: read at every scan. on_change: called after one.
    """

    def __init__(
        self, scan: Scan | None, settings: Callable[[], Settings], on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.models: tuple[LocalModel, ...] = ()
        self._scan = scan
        self._settings = settings
        self._on_change = on_change
        self._scanned = -math.inf  # time.monotonic() of the last scan
        self._running: asyncio.Task[None] | None = None

    @property
    def usable(self) -> list[LocalModel]:
        """The models that can be loaded."""
        return [model for model in self.models if model.facts]

    def find(self, name: str) -> LocalModel | None:
        """The model with this name that can be loaded; None without one, and then the folders are searched again."""
        found = next((model for model in self.usable if name in model.names), None)
        if found is None:
            self.refresh_soon()
        return found

    def get(self, name: str) -> LocalModel | None:
        """The model with this name, damaged or not."""
        return next((model for model in self.models if name in model.names), None)

    def with_source(self, source: str) -> LocalModel | None:
        """The model of a source, by its path or, in the hub's cache, its id."""
        return next((model for model in self.usable if source in sources_of(model)), None)

    def refresh_soon(self) -> None:
        """Start a scan in the background, unless the last one is up to date."""
        if self._scan and time.monotonic() - self._scanned > FRESH:
            self._start()

    async def refresh(self) -> None:
        """Search the folders now, and wait for what is found. A scan that runs already may have begun too early."""
        if self._running:
            await asyncio.shield(self._running)
        if self._scan:
            await asyncio.shield(self._start())

    def _start(self) -> asyncio.Task[None]:
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return self._running

    async def _run(self) -> None:
        settings = self._settings()
        try:
            is_on = self._scan and settings.library
            self.models = await asyncio.to_thread(self._scan, settings.model_dirs) if is_on and self._scan else ()
        except Exception as error:
            log.warning("The models of this machine could not be listed: %s: %s", type(error).__name__, error)
        finally:
            self._scanned, self._running = time.monotonic(), None
        self._on_change()


def sources_of(model: LocalModel) -> tuple[str, ...]:
    """Sources, as registered models may state them, that are this model."""
    own = str(model.path)
    return (own, model.key) if model.place == "huggingface" else (own,)
