"""Progress of a load, and its abort."""

from __future__ import annotations

from collections.abc import Callable

from mlxserver.engine.errors import LoadAborted


class Loading:
    """Progress callback of one load, on the engine thread. abort() comes from another thread.

    report: called with a stage ("downloading", "converting", "reading", "warming up"), the amount that is done, and the
    whole amount (0: not known).
    """

    def __init__(self, key: str, report: Callable[[str, int, int], None]) -> None:
        self._key = key
        self._report = report
        self._is_aborted = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report a step. Raises LoadAborted after abort()."""
        if self._is_aborted:
            raise LoadAborted(self._key)
        self._report(stage, done, total)

    def abort(self) -> None:
        """Have the next step raise LoadAborted."""
        self._is_aborted = True
