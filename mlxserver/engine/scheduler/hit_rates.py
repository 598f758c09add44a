"""Hit rates: how often predictions of the next token are right."""

from __future__ import annotations

from bisect import bisect_right
from collections import abc
from dataclasses import dataclass

_STREAKS = (5, 9, 17)  # bounds of the classes of streaks that have a hit rate each
_PRIOR_RATES, _PRIOR_WEIGHT = (0.2, 0.6, 0.85, 0.95), 8
_MODEL_WEIGHT = 2  # of the model's rate in that of a sequence, in predictions
_MOST_OF_MODEL, _MOST_OF_SEQUENCE = 512, 64  # predictions that count


@dataclass
class _Hits:
    """Predictions and how many were right; older ones count less."""

    most: int
    hits: float = 0.0
    count: float = 0.0

    def note(self, is_hit: bool) -> None:
        self.hits, self.count = self.hits + is_hit, self.count + 1
        if self.count > self.most:
            self.hits, self.count = self.hits / 2, self.count / 2


class HitRates:
    """How often predictions are right, by the streaks behind which they are made.

    model: those of all sequences, with which a sequence begins: one that edits a file does not speak for one that tells
    a story. None for the model's own, which begin with `priors`. bounds: of the classes of streaks, one fewer.
    """

    def __init__(
        self,
        model: HitRates | None = None,
        priors: abc.Sequence[float] = _PRIOR_RATES,
        bounds: abc.Sequence[int] = _STREAKS,
    ) -> None:
        self._model = model
        self._bounds: abc.Sequence[int] = model._bounds if model else bounds
        self._hits: list[_Hits]
        if model:
            self._hits = [_Hits(_MOST_OF_SEQUENCE) for _ in model._hits]
        else:
            self._hits = [_Hits(_MOST_OF_MODEL, rate * _PRIOR_WEIGHT, _PRIOR_WEIGHT) for rate in priors]

    def note(self, streak: int, is_hit: bool) -> None:
        """A token was predicted behind a streak, rightly or not."""
        self._hits[self._class_of(streak)].note(is_hit)
        if self._model:
            self._model.note(streak, is_hit)

    def rate(self, streak: int) -> float:
        """Share of predictions behind such a streak that are expected to be right."""
        own = self._hits[self._class_of(streak)]
        if not self._model:
            return own.hits / own.count
        return (own.hits + _MODEL_WEIGHT * self._model.rate(streak)) / (own.count + _MODEL_WEIGHT)

    def _class_of(self, streak: int) -> int:
        return bisect_right(self._bounds, streak)
