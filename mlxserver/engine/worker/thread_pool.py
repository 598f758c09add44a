"""Threads that are reused.

MLX never frees what it keeps for a thread and its stream, some 25 KiB each. Models come and go for as long as the
server lives; their threads stay.

Rule 1: a thread runs one task at a time, inside a stream of its own that lasts as long as the thread.
Rule 2: close() ends all threads: a process that exits while one of them lives can crash.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Joinable(Protocol):
    """Work on another thread."""

    def join(self) -> None:
        """Wait until it has ended."""


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """Run the work on a new thread."""
    thread = threading.Thread(target=work, name=name)
    thread.start()
    return thread


class Task:
    """Work on one of the threads."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self.work = work
        self.name = name
        self._ended = threading.Event()

    def join(self) -> None:
        """Wait until it has ended."""
        self._ended.wait()

    def end(self) -> None:
        """Release those that join()."""
        self._ended.set()


class ThreadPool:
    """Grows to as many threads as there are tasks at once. `stream` is entered once per thread."""

    def __init__(self, stream: Callable[[], AbstractContextManager[object]]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Task | None]] = []
        self._threads: list[tuple[threading.Thread, queue.SimpleQueue[Task | None]]] = []
        self._is_closed = False

    def start(self, work: Callable[[], None], name: str) -> Task:
        """Run the work on an idle thread or a new one. The work must not raise.

        Raises RuntimeError once the pool is closed.
        """
        task = Task(work, name)
        with self._lock:
            if self._is_closed:  # a load that is being cancelled may come this late
                raise RuntimeError(f"no thread for {name!r}: the pool is closed")
            inbox = self._idle.pop() if self._idle else self._new_thread()
        inbox.put(task)
        return task

    def call(self, work: Callable[[], T]) -> T:
        """Run the work on one of the threads; returns its result or raises its error."""
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
        """End every thread after its present task, and wait. Returns the names of those that did not end within
        `patience` seconds.
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
            while task := inbox.get():
                threading.current_thread().name = task.name
                task.work()
                threading.current_thread().name = "engine-idle"
                with self._lock:
                    self._idle.append(inbox)
                task.end()
                del task
