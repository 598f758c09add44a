"""Faults on an engine thread: whose they are, and what the one whom they concern is told.

Rule: what is done for one request alone may raise any BaseException: tokenizers and grammars are written in Rust, whose
      panics are no Exceptions. It ends that request.
"""

from __future__ import annotations

import logging
from typing import TypeVar

from mlxserver.engine.errors import EngineError, RequestFailed
from mlxserver.engine.sequence import Constraint

log = logging.getLogger("engine")

E = TypeVar("E", bound=BaseException)

# What MLX says on Metal (allocator, command buffer), on CUDA (allocator, graphs, cuBLAS) and on a CPU, in lower case.
_OUT_OF_MEMORY = (
    "unable to allocate",
    "attempting to allocate",
    "out of memory",
    "outofmemory",
    "insufficient memory",
    "alloc_failed",
    "bad_alloc",
    "[metal::malloc] resource limit",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was no memory for an array, or for a step."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    )


def request_failure(key: str, error: BaseException) -> EngineError:
    """What the one caller whom an error concerns is told. An unplanned one is logged."""
    if isinstance(error, EngineError):
        return without_frames(error)
    log.error("a request to %r failed", key, exc_info=error)
    return RequestFailed(key, f"{type(error).__name__}: {error}")


def without_frames(error: E) -> E:
    """The error without its traceback, whose frames would keep the model's memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class GuardedConstraint:
    """A row's constraint whose fault is noted, with the row's id, instead of raised: it must not end the step of all.

    From then on it allows everything; what the row says is not told any more.
    """

    def __init__(self, sequence_id: int, inner: Constraint, faults: list[tuple[int, BaseException]]) -> None:
        self._row_id = sequence_id
        self._inner = inner
        self._faults = faults
        self._is_broken = False

    def allowed(self) -> bytes | None:
        """What the constraint allows."""
        if self._is_broken:
            return None
        try:
            return self._inner.allowed()
        except BaseException as error:
            self._break(error)
            return None

    def accept(self, token: int) -> None:
        """Tell the constraint."""
        if self._is_broken:
            return
        try:
            self._inner.accept(token)
        except BaseException as error:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        self._is_broken = True
        self._faults.append((self._row_id, error))
