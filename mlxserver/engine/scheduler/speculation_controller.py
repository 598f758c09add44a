"""Controller of the speculation of one model: how many tokens of each sequence the next step verifies.

Rule 1: how often predictions are right is measured whether they are drafted or not; what a verifying step costs is
        measured by a few of them, against plain steps of as many sequences.
Rule 2: a step drafts only where it is expected to give more tokens per second than a plain one.
"""

from __future__ import annotations

import math
from collections import abc, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median, median_low

from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.scheduler.hit_rates import HitRates

SIZES = (4, 8, 16)  # tokens of a sequence in a verifying step, the first of which is not drafted: few, for their shapes
REHEARSED = (SIZES[0], SIZES[-1])  # where each shape is compiled: a GPU takes hardly longer for the longest
_ALWAYS = 8  # where nothing is measured

_GAIN = 1.05  # least ratio of tokens per second to those of plain steps
_ASSUMED_COST = 0.08  # of each more token, in plain steps, until it is measured
_PLAIN_STEPS, _SAMPLES = 15, 5  # whose median counts
_LEAST_PLAIN_STEPS, _LEAST_SAMPLES = 3, 2
_RETRY = 512  # steps that did not pay, after which one is tried all the same
_READ_FOR_RETRY = 512  # most tokens that a draft model reads for that
_HELD_OFF = 256  # steps after one whose logits were not finite

_PRIOR_DRAFT_RATES = (0.6, 0.7, 0.8, 0.85)  # of a draft model, by how many of its last tokens were right
_ANSWER_TOKENS = 128  # that are left of an answer, if it may have as many: what reading a prompt pays off in


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


@dataclass(frozen=True, slots=True)
class EitherRow:
    """A sequence that may draft by lookup, or by a draft model."""

    lookup: DraftingRow | None
    model: DraftingRow | None

    def accepted(self, tokens: int) -> float:
        """As DraftingRow's, of the better one."""
        return max((row.accepted(tokens) for row in (self.lookup, self.model) if row), default=0.0)

    def prefers_model(self, tokens: int) -> bool:
        """Whether the draft model is expected to be right more often, in a step that verifies so many tokens."""
        if self.model is None:
            return False
        return self.lookup is None or self.lookup.accepted(tokens) < self.model.accepted(tokens)


Rows = abc.Sequence[DraftingRow] | abc.Sequence[EitherRow]


@dataclass(frozen=True, slots=True)
class Plan:
    """The next step: tokens of each sequence, 1 in a plain one, and whether a draft model drafts."""

    tokens: int = 1
    is_modelled: bool = False


PLAIN = Plan()


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
        # The lower one of two: what else runs on the machine makes a step longer, never shorter.
        return median_low(self.samples) if len(self.samples) >= _LEAST_SAMPLES else None


class SpeculationController:
    """Decides for one model whether a step verifies drafted tokens, and counts these. always: if one is predicted.

    draft_cost: of a draft model's step, in plain steps, until it is measured along with the verifying ones.
    draft_rates: how often it is right, None for those of any. draft_sizes: tokens of the steps that it drafts for.
    """

    def __init__(
        self,
        metrics: ModelMetrics,
        *,
        always: bool = False,
        draft_cost: float = 0.0,
        draft_rates: HitRates | None = None,
        draft_sizes: abc.Sequence[int] = SIZES,
    ) -> None:
        self._metrics = metrics
        self._always = always
        self.draft_cost = draft_cost
        self.rates = HitRates()
        self.draft_rates = draft_rates or HitRates(priors=_PRIOR_DRAFT_RATES)
        self._draft_sizes = draft_sizes
        self._plain: dict[int, deque[float]] = {}  # seconds of plain steps, by number of sequences
        self._costs: dict[tuple[int, Plan], _Cost] = {}  # by number of sequences
        self._held_off = 0

    def note_plain(self, sequences: int, seconds: float) -> None:
        """Duration of a plain step of so many sequences."""
        self._plain.setdefault(_rounded(sequences), deque(maxlen=_PLAIN_STEPS)).append(seconds)

    def note_verified(self, sequences: int, plan: Plan, seconds: float | None) -> None:
        """Duration of a verifying step of so many sequences; None if it is not known."""
        plain = self._plain_seconds(sequences)
        if seconds is not None and plain:
            self._cost(sequences, plan).note(seconds / plain)

    def note_drafts(self, drafted: int, accepted: int) -> None:
        """Count drafted tokens and those that were accepted."""
        self._metrics.drafted_tokens += drafted
        self._metrics.accepted_tokens += accepted

    def hold_off(self) -> None:
        """Verify nothing for some steps: the logits of one were not finite."""
        self._held_off = _HELD_OFF

    def choose(
        self,
        sequences: int,
        rows: abc.Sequence[DraftingRow],
        fits: Callable[[int], bool],
        modelled: abc.Sequence[EitherRow] = (),
        most_cost: float = math.inf,
    ) -> Plan:
        """Plan of the next step of so many sequences.

        rows: of those that may draft by lookup. modelled: of all that may draft, where a draft model could. fits:
        whether so many tokens have room. most_cost: of any but the shortest verifying step.
        """
        if self._held_off:
            self._held_off -= 1
            return PLAIN
        if not (rows or modelled):
            return PLAIN
        if self._always:
            sizes = self._sizes(is_modelled=bool(modelled))
            tokens = next((size for size in reversed(sizes) if size <= _ALWAYS and fits(size)), 1)
            return Plan(tokens, bool(modelled)) if tokens > 1 else PLAIN
        if not self._plain_seconds(sequences):
            return PLAIN
        offers = [self._best(sequences, rows, fits, most_cost, is_modelled=False)]
        offers += [self._best(sequences, modelled, fits, most_cost, is_modelled=True)] if modelled else []
        best, gain = max(offers, key=lambda offer: offer[1])
        return best if gain > _GAIN else self._retried(sequences, rows, fits, has_model=bool(modelled))

    def may_read(self, sequences: int, modelled: abc.Sequence[EitherRow], tokens: int, token_seconds: float) -> bool:
        """Whether it pays that a draft model reads so many tokens, for these rows to draft with it."""
        if self._always:
            return True
        if self._held_off or not (plain := self._plain_seconds(sequences)):
            return False
        _, gain = self._best(sequences, modelled, lambda size: True, math.inf, is_modelled=True)
        if gain <= _GAIN:
            retried = self._cost(sequences, Plan(self._draft_sizes[0], is_modelled=True))
            retried.num_declined += 1
            return retried.num_declined >= _RETRY and tokens <= _READ_FOR_RETRY
        left = max((min(row.model.most, _ANSWER_TOKENS) for row in modelled if row.model), default=0)
        return tokens * token_seconds < left * plain * (1 - 1 / gain)

    def cost(self, sequences: int, plan: Plan) -> float:
        """Duration of a verifying step of so many sequences, in plain steps."""
        return self._cost(sequences, plan).ratio or self._assumed(sequences, plan)

    def _best(
        self, sequences: int, rows: Rows, fits: Callable[[int], bool], most_cost: float, *, is_modelled: bool
    ) -> tuple[Plan, float]:
        """The plan with the largest expected ratio of tokens per second to those of a plain step, and that ratio."""
        best, most = PLAIN, 1.0
        sizes = self._sizes(is_modelled=is_modelled)
        for tokens in sizes:
            if not fits(tokens):
                continue
            plan = Plan(tokens, is_modelled)
            cost = self.cost(sequences, plan)
            if tokens > sizes[0] and cost > most_cost:
                break
            gain = (sequences + sum(row.accepted(tokens) for row in rows)) / sequences / cost
            if gain > most:
                best, most = plan, gain
            if self._cost(sequences, plan).ratio is None:
                break  # a longer one costs more
        return best, most

    def _assumed(self, sequences: int, plan: Plan) -> float:
        """Cost until it is measured: as if each more token took as long as those of the next shorter step."""
        for shorter in reversed(self._sizes(is_modelled=plan.is_modelled)):
            if shorter < plan.tokens and (ratio := self._cost(sequences, replace(plan, tokens=shorter)).ratio):
                return 1 + max(ratio - 1, 0) / (shorter - 1) * (plan.tokens - 1)
        return 1 + (_ASSUMED_COST + (self.draft_cost if plan.is_modelled else 0)) * (plan.tokens - 1)

    def _retried(
        self, sequences: int, rows: abc.Sequence[DraftingRow], fits: Callable[[int], bool], *, has_model: bool
    ) -> Plan:
        """The shortest step now and then: by lookup if it would pay at the cost that is assumed at first; else by a
        draft model, whose rates are measured by nothing else.
        """
        tokens = SIZES[0]
        gained = sum(row.accepted(tokens) for row in rows)
        if (sequences + gained) / sequences > _GAIN * (1 + _ASSUMED_COST * (tokens - 1)):
            plan = Plan(tokens)
        else:
            plan = Plan(self._draft_sizes[0], is_modelled=True)
        if not fits(plan.tokens):
            return PLAIN
        cost = self._cost(sequences, plan)
        cost.num_declined += 1
        if cost.num_declined < _RETRY or (plan.is_modelled and not has_model):
            return PLAIN
        cost.num_declined = 0
        return plan

    def _sizes(self, *, is_modelled: bool) -> abc.Sequence[int]:
        """Tokens of a verifying step."""
        return self._draft_sizes if is_modelled else SIZES

    def _plain_seconds(self, sequences: int) -> float | None:
        measured = self._plain.get(_rounded(sequences), ())
        return median(measured) if len(measured) >= _LEAST_PLAIN_STEPS else None

    def _cost(self, sequences: int, plan: Plan) -> _Cost:
        return self._costs.setdefault((_rounded(sequences), plan), _Cost())


def _rounded(sequences: int) -> int:
    return 1 << (sequences - 1).bit_length()
