"""ThreadPool that are used again and again.

What MLX keeps for a thread and its stream is never given back, some 25 KiB for each. Models come and go for as long as
the server lives; their threads stay.

Rule 1: a thread does one piece of work at a time, inside a stream of its own that lasts as long as the thread.
Rule 2: close() ends all of them: a process that ends while such a thread lives can end badly.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

T = TypeVar("T")


class Task:
    """One piece of work on one of the threads."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self.work = work
        self.name = name
        self._ended = threading.Event()

    def join(self) -> None:
        """Wait until the work has ended."""
        self._ended.wait()

    def end(self) -> None:
        """Note that it has."""
        self._ended.set()


class ThreadPool:
    """As many threads as there is work at once. `stream` is entered once on each."""

    def __init__(self, stream: Callable[[], AbstractContextManager[object]]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Task | None]] = []
        self._threads: list[tuple[threading.Thread, queue.SimpleQueue[Task | None]]] = []
        self._is_closed = False

    def start(self, work: Callable[[], None], name: str) -> Task:
        """Begin a piece of work, on a thread that has none or a new one. The work must not raise.

        Raises RuntimeError once they are closed.
        """
        shift = Task(work, name)
        with self._lock:
            if self._is_closed:  # a load that is still being called off may come this late
                raise RuntimeError(f"no thread for {name!r}: they are closed")
            inbox = self._idle.pop() if self._idle else self._new_thread()
        inbox.put(shift)
        return shift

    def call(self, work: Callable[[], T]) -> T:
        """Do a piece of work on one of the threads and give what it gives, or raise what it raises."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        self.start(run, "call").join()
        if errors:
            raise errors.pop()
        return results[0]

    def close(self, patience: float | None = None) -> list[str]:
        """End every thread, after the work that it has, and wait for it. Gives the names of those that did not end
        within `patience` seconds.
        """
        with self._lock:
            self._is_closed = True
            self._idle.clear()
            threads, self._threads = self._threads, []
        for _, inbox in threads:
            inbox.put(None)
        end = None if patience is None else time.monotonic() + patience
        for thread, _ in threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return [thread.name for thread, _ in threads if thread.is_alive()]

    def _new_thread(self) -> queue.SimpleQueue[Task | None]:
        inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._live, args=(inbox,), name="engine-idle")
        self._threads.append((thread, inbox))
        thread.start()
        return inbox

    def _live(self, inbox: queue.SimpleQueue[Task | None]) -> None:
        with self._stream():
            while shift := inbox.get():
                threading.current_thread().name = shift.name
                shift.work()
                threading.current_thread().name = "engine-idle"
                with self._lock:
                    self._idle.append(inbox)
                shift.end()
                del shift
