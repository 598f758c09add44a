"""Idle steps of a model, done while no model of the process computes.

Rule: of all models of a process, one does an idle step at a time. A step beside the streams of another model would hold
      them up, and a measurement beside anything would be wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from mlxserver.engine.worker.runner import PAUSE


class IdleTurns:
    """Whose idle step it is, of the models of one process. Used on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def taken(self, steps: Iterator[object], is_quiet: Callable[[], bool]) -> Iterator[object]:
        """The steps, each of them when it is its turn and nothing else computes; PAUSE until then."""
        while True:
            while not (is_quiet() and self._lock.acquire(blocking=False)):
                yield PAUSE
            try:
                done = next(steps)
            except StopIteration:
                return
            finally:
                self._lock.release()
            yield done
