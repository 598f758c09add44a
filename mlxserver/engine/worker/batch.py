"""The seam between an engine thread and what computes for it."""

from __future__ import annotations

from collections import abc
from collections.abc import Collection
from typing import Protocol

from mlxserver.engine.sequence import SampledToken, Sequence


class Batch(Protocol):
    """Rows decoded together. The seam at which tests put a scripted batch instead of a model.

    All calls are made on the engine thread.
    """

    def insert(self, rows: abc.Sequence[Sequence]) -> None:
        """Queue rows that share one prompt; they join together at one of the next steps."""

    def remove(self, sequence_ids: abc.Sequence[int]) -> None:
        """Forget rows, wherever they are. Unknown ids are ignored."""

    def decode(self) -> list[SampledToken]:
        """Advance every decoding row by one token; empty while there is none."""

    def prefill(self) -> None:
        """Process one chunk of the waiting prompts, sized so that running streams go on."""

    def is_empty(self) -> bool:
        """Whether no row is waiting or decoding."""

    def waiting(self) -> set[int]:
        """Ids of the rows that have no place yet. May be asked after a call that failed."""

    def restart(self, staying: Collection[int]) -> list[SampledToken]:
        """Drop all that was computed, kept prefixes included; may be called after a call that failed.

        The rows that stay wait again, and go on from where they were; the others are forgotten. Gives the tokens that
        were generated and not given before.
        """

    def close(self) -> None:
        """Free what the batch holds. The batch is not used afterwards."""
