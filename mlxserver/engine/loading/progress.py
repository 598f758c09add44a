"""One load under way: how far it is, and the way to call it off."""

from __future__ import annotations

from collections.abc import Callable

from mlxserver.engine.errors import LoadAborted


class Loading:
    """Called on the engine thread with each step of the load; abort() comes from another one.

    `tell` hears a stage ("downloading", "converting", "reading", "warming up"), how much of it is done, and of how
    much (0: not known).
    """

    def __init__(self, key: str, tell: Callable[[str, int, int], None]) -> None:
        self._key = key
        self._tell = tell
        self._is_aborted = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report a step. Raises LoadAborted if the load was called off."""
        if self._is_aborted:
            raise LoadAborted(self._key)
        self._tell(stage, done, total)

    def abort(self) -> None:
        """Make the next step fail."""
        self._is_aborted = True
