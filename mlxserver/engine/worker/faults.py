"""Faults on an engine thread: out of memory or not, and faults of one request alone.

Rule: work for one request alone may raise any BaseException: tokenizers and grammars are written in Rust, whose panics
      are no Exceptions. It ends that request and no other.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from mlxserver.engine.errors import EngineError, RequestFailed
from mlxserver.engine.sequence import Constraint, PromptImages

log = logging.getLogger("engine")

E = TypeVar("E", bound=BaseException)

# From MLX's messages on Metal (allocator, command buffer), CUDA (allocator, graphs, cuBLAS) and CPU, in lower case.
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
    """Whether an allocation failed, of an array or of a step."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    )


def request_failure(key: str, error: BaseException) -> EngineError:
    """The EngineError of one request that failed. An unexpected error is logged."""
    if isinstance(error, EngineError):
        return without_frames(error)
    log.error("a request to %r failed", key, exc_info=error)
    return RequestFailed(key, f"{type(error).__name__}: {error}")


def without_frames(error: E) -> E:
    """The error without its traceback, whose frames would keep the model's memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class GuardedConstraint:
    """A sequence's constraint whose error is recorded, with the sequence's id, instead of raised: it must not end the
    step of all sequences.

    From then on it allows every token; the engine ends the request at its next publish.
    """

    def __init__(self, sequence_id: int, inner: Constraint, faults: list[tuple[int, BaseException]]) -> None:
        self._sequence_id = sequence_id
        self._inner = inner
        self._faults = faults
        self._is_broken = False

    def allowed(self) -> bytes | None:
        """The tokens that the constraint allows."""
        if self._is_broken:
            return None
        try:
            return self._inner.allowed()
        except BaseException as error:
            self._break(error)
            return None

    def accept(self, token: int) -> None:
        """Advance the constraint."""
        if self._is_broken:
            return
        try:
            self._inner.accept(token)
        except BaseException as error:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        self._is_broken = True
        self._faults.append((self._sequence_id, error))


class GuardedImages:
    """A prompt's images, an error of which is recorded as that of a constraint is. From then on nothing is seen, and
    nothing is stored of its KV cache. Where memory runs out, that is raised.
    """

    def __init__(self, sequence_id: int, inner: PromptImages, faults: list[tuple[int, BaseException]]) -> None:
        self.shift = inner.shift
        self._sequence_id = sequence_id
        self._inner = inner
        self._faults = faults
        self._is_broken = False

    def keys(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """What the KV cache of these tokens is stored under."""
        return () if self._is_broken else self._inner.keys(tokens)

    def whole(self, start: int, end: int) -> int:
        """Where a chunk of these tokens should end."""
        return self._inner.whole(start, end)

    def encode(self, start: int, end: int) -> bool:
        """Compute the features of one image."""
        if self._is_broken:
            return False
        try:
            return self._inner.encode(start, end)
        except Exception as error:
            self._break(error)
            return False

    def showing(self, start: int, end: int) -> AbstractContextManager[None]:
        """A forward pass of these tokens in the block sees the images."""
        if not self._is_broken:
            try:
                return self._inner.showing(start, end)
            except Exception as error:
                self._break(error)
        return nullcontext()

    def _break(self, error: Exception) -> None:
        if is_out_of_memory(error):
            raise error
        self._is_broken = True
        self._faults.append((self._sequence_id, error))
