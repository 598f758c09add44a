"""Outcome of a load, of a model of any kind: whole, or LoadFailed with a reason, and then nothing stays in memory."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

from mlxserver.engine.mlx import mx

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import EngineError, LoadAborted, LoadFailed
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.unsupported import Unsupported
from mlxserver.engine.platform import device, openblas

log = logging.getLogger("engine")

T = TypeVar("T")


def complete_or_nothing(spec: ModelSpec, load: Callable[[], T]) -> T:
    """What the load returns. Raises LoadAborted, or LoadFailed for any other error."""
    openblas.warn_if_missing()
    failure: EngineError
    try:
        loaded = load()
        _reset_random_state()
        return loaded
    except LoadAborted:
        failure = LoadAborted(spec.key)
    except Exception as error:  # a broken model can raise anything from any of the libraries
        log.debug("Loading %s failed", spec.key, exc_info=True)
        failure = LoadFailed(spec.key, reason_of(error))
    # Out here, because an error raised above would carry the failed load's frames, and with them its weights.
    _reset_random_state()
    gc.collect()
    device.clear_cache()
    raise failure


def _reset_random_state() -> None:
    """Drop a model's initial weights, which are never computed, from this thread's random state."""
    mx.random.seed(0)


class Unusable(Exception):
    """A part of the checkpoint that can't be used, with the reason."""


@contextlib.contextmanager
def naming(problem: str) -> Iterator[None]:
    """Raise Unusable, with the problem, for any error in the block."""
    try:
        yield
    except LoadAborted:
        raise
    except Exception as error:
        raise Unusable(f"{problem}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Why a load failed, in one line that is not long."""
    text = " ".join(str(error).split())
    if not isinstance(error, (SourceInvalid, Unusable, Unsupported, ValueError, RuntimeError, OSError)) or not text:
        text = f"{type(error).__name__} {text}".rstrip()
    return text if len(text) <= 400 else text[:400] + " ..."
