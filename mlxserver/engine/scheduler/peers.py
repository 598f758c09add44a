"""Peers: what a scheduler knows of the other models that compute in its process."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Protocol

from mlxserver.engine.metrics import EngineLoad
from mlxserver.engine.platform import openblas


class Peers(Protocol):
    """The other models, as a scheduler asks for them once per step."""

    def observe(self, own: EngineLoad) -> float:
        """Make ready for a step of the model with this load. Returns the seconds that a decode step takes for the
        quickest peer that streams, 0 without any.
        """


@dataclass(slots=True)
class FixedPeers:
    """Peers whose step takes so many seconds; none by default."""

    step_seconds: float = 0.0

    def observe(self, own: EngineLoad) -> float:
        """The fixed duration."""
        return self.step_seconds


class ProcessPeers:
    """All models of this process; shared by their schedulers, on any thread."""

    def __init__(self) -> None:
        self._cores = openblas.threads()
        self._loads: list[weakref.ref[EngineLoad]] = []  # replaced, never changed: read without the lock
        self._lock = threading.Lock()  # models are built on threads of their own

    def add(self, load: EngineLoad) -> None:
        """Add a model; it leaves with its load."""
        with self._lock:
            self._loads = [*(known for known in self._loads if known()), weakref.ref(load)]

    def are_idle(self, own: EngineLoad) -> bool:
        """Whether no other model has sequences."""
        loads = [load for known in self._loads if (load := known())]
        return not any(load.is_busy for load in loads if load is not own)

    def observe(self, own: EngineLoad) -> float:
        """Divide the cores among the models at work: two that take turns with all of OpenBLAS's threads lose time."""
        loads = [load for known in self._loads if (load := known())]
        working = sum(load.is_busy for load in loads)
        openblas.use_threads(max(1, self._cores // max(1, working)))
        steps = (load.step_seconds for load in loads if load is not own)
        return min(filter(None, steps), default=0.0)
