"""The seam between an engine thread and the computation."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Collection
from typing import Protocol, runtime_checkable

from mlxserver.engine.metrics import EngineLoad
from mlxserver.engine.sequence import SampledToken, Sequence


class Batch(Protocol):
    """Sequences that are decoded together. The seam at which tests put a scripted batch instead of a model.

    All calls are made on the engine thread; `load` may be read on any thread.
    """

    @property
    def load(self) -> EngineLoad:
        """What other threads may read of the batch. Holds nothing of the model."""

    def insert(self, sequences: abc.Sequence[Sequence]) -> None:
        """Queue the sequences of one request, which share one prompt; they join together at one of the next steps."""

    def remove(self, sequence_ids: abc.Sequence[int]) -> None:
        """Remove sequences, whether they wait or run. Unknown ids are ignored."""

    def decode(self) -> list[SampledToken]:
        """Advance every decoding sequence by one token; empty while there is none."""

    def prefill(self) -> None:
        """Process one chunk of the waiting prompts, of a size that lets running streams go on."""

    def is_empty(self) -> bool:
        """Whether no sequence waits or runs."""

    def waiting(self) -> set[int]:
        """Ids of the sequences without a slot. May be called after a call that failed."""

    def restart(self, staying: Collection[int]) -> list[SampledToken]:
        """Drop all KV cache, the prefix cache included; may be called after a call that failed.

        The sequences that stay wait again and resume where they were; the others are removed. Returns the tokens that
        were generated and not returned before.
        """

    def close(self) -> None:
        """Free what the batch holds. The batch is not used afterwards."""


@runtime_checkable
class LaunchingBatch(Protocol):
    """A batch whose steps are prepared on the engine thread and then launched, for which no Python runs.

    before_launch: called once a step or a chunk is prepared, and before a wait. What it has other threads do takes no
    time from the step.
    """

    before_launch: Callable[[], None]
