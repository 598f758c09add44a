"""The states of a model, and what is told of it on its way from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

UnloadMode = Literal["drain", "abort", "reject"]


class ModelState(Enum):
    """Where a model is in its life."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "loaded"
    EVICTING = "evicting"
    DRAINING = "draining"
    FAILED = "failed"


TRANSITIONS = {
    ModelState.UNLOADED: {ModelState.LOADING},
    ModelState.LOADING: {ModelState.READY, ModelState.FAILED, ModelState.UNLOADED},  # called off, or no memory
    ModelState.READY: {ModelState.EVICTING, ModelState.DRAINING, ModelState.FAILED},  # its engine ended by itself
    ModelState.EVICTING: {ModelState.DRAINING, ModelState.UNLOADED},
    ModelState.DRAINING: {ModelState.UNLOADED},
    ModelState.FAILED: {ModelState.LOADING, ModelState.UNLOADED},  # unloaded by somebody: it may be tried at once
}


@dataclass(frozen=True, slots=True)
class UnloadReport:
    """What an unload did with the requests that were in progress, and what it gave back."""

    completed: int
    aborted: int
    freed_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """How far a load is: a stage, how much of it is done, and of how much (0: not known)."""

    stage: str
    done: int = 0
    total: int = 0
