"""Worker processes of the zoo: a case that hangs, or ends its process, costs no other case."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

from tools.zoo.check import Result, check, policy_of

_SPAWN = multiprocessing.get_context("spawn")  # a fork would share MLX's threads


class _Worker:
    """A process that checks one architecture after the other."""

    def __init__(self, *, is_padded: bool) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, is_padded), daemon=True)
        self._process.start()
        theirs.close()  # or else its end would not be seen here
        self.name, self.start = "", time.monotonic()

    def give(self, name: str) -> None:
        """Have it check an architecture."""
        self.name, self.start = name, time.monotonic()
        self.connection.send(name)

    def result(self) -> Result:
        """The result that has come. Raises EOFError if the process has ended."""
        own: Result = self.connection.recv()
        return own

    def failed(self, reason: str) -> Result:
        """The result of a case that gave none."""
        return Result(self.name, "", reason, time.monotonic() - self.start)

    def end(self) -> int | None:
        """End the process. Returns its exit status, negative after a signal."""
        self.connection.close()
        self._process.join(1)
        status = self._process.exitcode
        self._process.kill()
        return status


def run_all(names: list[str], jobs: int, limit: float, *, is_padded: bool) -> Iterator[Result]:
    """The results of these architectures as they come. limit: seconds for each."""
    waiting, busy = list(reversed(names)), list[_Worker]()
    idle = list[_Worker]()
    while waiting or busy:
        while waiting and len(busy) < jobs:
            worker = idle.pop() if idle else _Worker(is_padded=is_padded)
            worker.give(waiting.pop())
            busy.append(worker)
        first = min(worker.start for worker in busy) + limit - time.monotonic()
        ready = wait([worker.connection for worker in busy], max(0.0, first))
        for worker in list(busy):
            if worker.connection in ready:
                busy.remove(worker)
                try:
                    yield worker.result()
                    idle.append(worker)
                except EOFError:
                    yield worker.failed(f"its process ended with exit status {worker.end()}")
            elif time.monotonic() - worker.start > limit:
                busy.remove(worker)
                worker.end()
                yield worker.failed(f"no result within {limit:.0f} s")
    for worker in idle:
        worker.end()


def _serve(connection: Connection, is_padded: bool) -> None:
    """Check what is asked for until the other side closes."""
    # MLX writes compiled kernels to files of this folder without a lock.
    os.environ["MLX_PTX_CACHE_DIR"] = tempfile.mkdtemp(prefix="zoo-ptx-")
    policy = policy_of(is_padded=is_padded)
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        connection.send(check(name, policy))
