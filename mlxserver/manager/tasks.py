"""Tasks of the manager that go on when the request that asked for them has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from mlxserver.manager.loading import retrieve_exception

T = TypeVar("T")


class Tasks:
    """Tasks that run by themselves; the end of the server waits for them."""

    def __init__(self) -> None:
        self.pending: set[asyncio.Task[Any]] = set()

    def keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task."""
        task = asyncio.create_task(work)
        self.pending.add(task)
        task.add_done_callback(self.pending.discard)
        task.add_done_callback(retrieve_exception)  # its caller may have left
        return task
