"""Controller of the speculation of one model: how many tokens of each sequence the next step verifies.

Rule 1: how often predictions are right is measured whether they are drafted or not; what a verifying step costs is
        measured by a few of them, against plain steps of as many sequences.
Rule 2: a step drafts only where it is expected to give more tokens per second than a plain one.
"""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from mlxserver.engine.metrics import ModelMetrics

SIZES = (4, 8, 16)  # tokens of a sequence in a verifying step, the first of which is not drafted: few, for their shapes
_ALWAYS = 8  # where nothing is measured

_GAIN = 1.05  # least ratio of tokens per second to those of plain steps
_ASSUMED_COST = 0.08  # of each more token, in plain steps, until it is measured
_PLAIN_STEPS, _SAMPLES = 15, 5  # whose median counts
_LEAST_PLAIN_STEPS, _LEAST_SAMPLES = 3, 2
_RETRY = 512  # steps that did not pay, after which one is tried all the same
_HELD_OFF = 256  # steps after one whose logits were not finite

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
    a story. None for the model's own.
    """

    def __init__(self, model: HitRates | None = None) -> None:
        self._model = model
        if model:
            self._hits = [_Hits(_MOST_OF_SEQUENCE) for _ in _PRIOR_RATES]
        else:
            self._hits = [_Hits(_MOST_OF_MODEL, rate * _PRIOR_WEIGHT, _PRIOR_WEIGHT) for rate in _PRIOR_RATES]

    def note(self, streak: int, is_hit: bool) -> None:
        """A token was predicted behind a streak, rightly or not."""
        self._hits[_streak_class(streak)].note(is_hit)
        if self._model:
            self._model.note(streak, is_hit)

    def rate(self, streak: int) -> float:
        """Share of predictions behind such a streak that are expected to be right."""
        own = self._hits[_streak_class(streak)]
        if not self._model:
            return own.hits / own.count
        return (own.hits + _MODEL_WEIGHT * self._model.rate(streak)) / (own.count + _MODEL_WEIGHT)


@dataclass(frozen=True, slots=True)
class DraftingRow:
    """A sequence that may draft: its streak, the most tokens, and how often its predictions are right."""

    streak: int
    most: int
    rates: HitRates

    def accepted(self, tokens: int) -> float:
        """Drafted tokens that are expected to be accepted in a step that verifies so many tokens."""
        total, chance = 0.0, 1.0
        for n in range(min(self.most, tokens - 1)):
            chance *= self.rates.rate(self.streak + n)
            total += chance
        return total


@dataclass
class _Cost:
    """Duration of a verifying step, in plain steps. The first of all is no sample: its shapes may be compiled."""

    samples: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    num_steps: int = 0
    num_declined: int = 0

    def note(self, ratio: float) -> None:
        self.num_steps += 1
        if self.num_steps > 1:
            self.samples.append(ratio)

    @property
    def ratio(self) -> float | None:
        return median(self.samples) if len(self.samples) >= _LEAST_SAMPLES else None


class SpeculationController:
    """Decides for one model whether a step verifies drafted tokens, and counts these. always: if one is predicted."""

    def __init__(self, metrics: ModelMetrics, *, always: bool = False) -> None:
        self._metrics = metrics
        self._always = always
        self.rates = HitRates()
        self._plain: dict[int, deque[float]] = {}  # seconds of plain steps, by number of sequences
        self._costs: dict[tuple[int, int], _Cost] = {}  # by number of sequences and tokens of each
        self._held_off = 0

    def note_plain(self, sequences: int, seconds: float) -> None:
        """Duration of a plain step of so many sequences."""
        self._plain.setdefault(_rounded(sequences), deque(maxlen=_PLAIN_STEPS)).append(seconds)

    def note_verified(self, sequences: int, tokens: int, seconds: float | None) -> None:
        """Duration of a verifying step with so many tokens of each sequence; None if it is not known."""
        plain = self._plain_seconds(sequences)
        if seconds is not None and plain:
            self._cost(sequences, tokens).note(seconds / plain)

    def note_drafts(self, drafted: int, accepted: int) -> None:
        """Count drafted tokens and those that were accepted."""
        self._metrics.drafted_tokens += drafted
        self._metrics.accepted_tokens += accepted

    def hold_off(self) -> None:
        """Verify nothing for some steps: the logits of one were not finite."""
        self._held_off = _HELD_OFF

    def choose(self, sequences: int, rows: abc.Sequence[DraftingRow], fits: Callable[[int], bool]) -> int:
        """Tokens of each of so many sequences in the next step; 1 for a plain one.

        rows: of the sequences that may draft. fits: whether so many tokens have room.
        """
        if self._held_off:
            self._held_off -= 1
            return 1
        if not rows:
            return 1
        if self._always:
            return next((tokens for tokens in reversed(SIZES) if tokens <= _ALWAYS and fits(tokens)), 1)
        if not self._plain_seconds(sequences):
            return 1
        best, most_gain = 1, _GAIN
        for tokens in SIZES:
            gain, is_measured = self._gain(sequences, rows, tokens)
            if gain > most_gain and fits(tokens):
                best, most_gain = tokens, gain
            if not is_measured:
                break  # a longer one costs more
        return best if best > 1 else self._retried(sequences, rows, fits)

    def _gain(self, sequences: int, rows: abc.Sequence[DraftingRow], tokens: int) -> tuple[float, bool]:
        """Expected ratio of tokens per second to those of a plain step, and whether the cost is measured."""
        cost = self._cost(sequences, tokens).ratio
        gained = sum(row.accepted(tokens) for row in rows)
        return (sequences + gained) / sequences / (cost or self._assumed(sequences, tokens)), cost is not None

    def _assumed(self, sequences: int, tokens: int) -> float:
        """Cost until it is measured: as if each more token took as long as those of the next shorter step."""
        for shorter in reversed(SIZES):
            if shorter < tokens and (ratio := self._cost(sequences, shorter).ratio):
                return 1 + max(ratio - 1, 0) / (shorter - 1) * (tokens - 1)
        return 1 + _ASSUMED_COST * (tokens - 1)

    def _retried(self, sequences: int, rows: abc.Sequence[DraftingRow], fits: Callable[[int], bool]) -> int:
        """The shortest step now and then, if it would pay at the cost that is assumed at first; else 1."""
        tokens = SIZES[0]
        cost = self._cost(sequences, tokens)
        gained = sum(row.accepted(tokens) for row in rows)
        if (sequences + gained) / sequences <= _GAIN * (1 + _ASSUMED_COST * (tokens - 1)) or not fits(tokens):
            return 1
        cost.num_declined += 1
        if cost.num_declined < _RETRY:
            return 1
        cost.num_declined = 0
        return tokens

    def _plain_seconds(self, sequences: int) -> float | None:
        measured = self._plain.get(_rounded(sequences), ())
        return median(measured) if len(measured) >= _LEAST_PLAIN_STEPS else None

    def _cost(self, sequences: int, tokens: int) -> _Cost:
        return self._costs.setdefault((_rounded(sequences), tokens), _Cost())


def _streak_class(streak: int) -> int:
    return sum(streak >= bound for bound in _STREAKS)


def _rounded(sequences: int) -> int:
    return 1 << (sequences - 1).bit_length()
