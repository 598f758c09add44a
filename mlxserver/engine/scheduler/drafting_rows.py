"""Rows that may draft: how many of their drafted tokens are expected to be accepted."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from mlxserver.engine.scheduler.hit_rates import HitRates

_NEGLIGIBLE = 0.01  # chance of a drafted token that is not worth the time to compute those behind it


@dataclass(frozen=True, slots=True)
class DraftingRow:
    """A sequence that may draft: its streak, the most tokens, and how often its predictions are right.

    is_pending: its last token is sampled and not read. It has to be the one that is predicted, or nothing is drafted.
    """

    streak: int
    most: int
    rates: HitRates
    is_pending: bool = False

    @property
    def chance(self) -> float:
        """Expected probability that it drafts at all, once its last token is read."""
        return self.rates.rate(self.streak) if self.is_pending else 1.0

    def accepted(self, tokens: int) -> float:
        """Drafted tokens that are expected to be accepted in a step that verifies so many tokens."""
        total, chance, streak = 0.0, self.chance, self.streak + self.is_pending
        for n in range(min(self.most, tokens - 1)):
            chance *= self.rates.rate(streak + n)
            total += chance
            if chance < _NEGLIGIBLE:
                break  # this is computed at each step that a prediction is there
        return total


@dataclass(frozen=True, slots=True)
class EitherRow:
    """A sequence that may draft by lookup, or by a draft model."""

    lookup: DraftingRow | None
    model: DraftingRow | None

    @property
    def chance(self) -> float:
        """As DraftingRow's, of the better one."""
        return max((row.chance for row in (self.lookup, self.model) if row), default=0.0)

    def accepted(self, tokens: int) -> float:
        """As DraftingRow's, of the better one."""
        return max((row.accepted(tokens) for row in (self.lookup, self.model) if row), default=0.0)

    def prefers_model(self, tokens: int) -> bool:
        """Whether the draft model is expected to be right more often, in a step that verifies so many tokens."""
        if self.model is None:
            return False
        return self.lookup is None or self.lookup.accepted(tokens) < self.model.accepted(tokens)


Rows = abc.Sequence[DraftingRow] | abc.Sequence[EitherRow]
