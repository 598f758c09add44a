"""Long-lived child process that answers one line of JSON with another, and can be stopped for a while."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.servers import ROOT, START_TIMEOUT, ServerFailed, pause, resume


class Worker:
    """Process that writes a line when it is ready, and then one for each line that it reads.

    Raises ServerFailed if it ends or is not ready in time.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True
        )
        try:
            self._read(START_TIMEOUT)
        except TimeoutError as error:
            raise ServerFailed(f"{name} was not ready within {START_TIMEOUT:.0f} s") from error
        except BaseException:
            self.close()
            raise

    def ask(self, question: Any, limit: float) -> Any:
        """The answer to a question. Raises TimeoutError after `limit` seconds, which ends the process."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
        except (OSError, ValueError) as error:  # broken, or closed
            raise ServerFailed(f"{self.name} has ended") from error
        return json.loads(self._read(limit))

    def _read(self, limit: float) -> bytes:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], limit)[0]:
            self.close()
            raise TimeoutError
        if not (line := self._process.stdout.readline()):
            raise ServerFailed(f"{self.name} ended with status {self._process.wait()}")
        return line

    def pause(self) -> None:
        """Take the processor from the process."""
        pause(self._process)

    def resume(self) -> None:
        """Let the process go on."""
        resume(self._process)

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


def answer_lines(answer: Callable[[Any], object]) -> None:
    """The other side of a Worker: answer each line of stdin. What else is printed goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        print(json.dumps("ready"), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=out, flush=True)
