"""States of a model, the table of transitions between them, and the reports of a load and an unload."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

UnloadMode = Literal["drain", "abort", "reject"]


class ModelState(Enum):
    """State of a model in its lifecycle."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "loaded"
    EVICTING = "evicting"
    DRAINING = "draining"
    FAILED = "failed"

    @property
    def is_leaving(self) -> bool:
        """Whether the model is being unloaded, and its memory with it."""
        return self in (ModelState.EVICTING, ModelState.DRAINING)

    @property
    def public_name(self) -> str:
        """Name of the state on the wire, where an eviction is a drain."""
        return "draining" if self is ModelState.EVICTING else str(self.value)


TRANSITIONS = {
    ModelState.UNLOADED: {ModelState.LOADING},
    ModelState.LOADING: {ModelState.READY, ModelState.FAILED, ModelState.UNLOADED},  # aborted, or no memory
    ModelState.READY: {ModelState.EVICTING, ModelState.DRAINING, ModelState.FAILED},  # its engine ended by itself
    ModelState.EVICTING: {ModelState.DRAINING, ModelState.UNLOADED},
    ModelState.DRAINING: {ModelState.UNLOADED},
    ModelState.FAILED: {ModelState.LOADING, ModelState.UNLOADED},  # an explicit unload ends the backoff
}


@dataclass(frozen=True, slots=True)
class UnloadReport:
    """Outcome of an unload: requests that completed and that were aborted, memory freed, and seconds it took."""

    completed: int
    aborted: int
    freed_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Progress of a load: its stage, how much of that is done, and of how much (0: unknown)."""

    stage: str
    done: int = 0
    total: int = 0
