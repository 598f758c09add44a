"""Plans of steps, and what they cost for one number of sequences: in plain steps, as measured by few of them."""

from __future__ import annotations

from collections import abc, defaultdict, deque
from dataclasses import dataclass
from statistics import median, median_low

_ASSUMED_COST = 0.08  # of each more token, in plain steps, until it is measured
_PLAIN_STEPS, _SAMPLES = 15, 5  # whose median counts
_LEAST_PLAIN_STEPS, _LEAST_SAMPLES = 3, 2


@dataclass(frozen=True, slots=True)
class Plan:
    """A step: tokens of each sequence, 1 in a plain one, and whether a draft model drafts."""

    tokens: int = 1
    is_modelled: bool = False


PLAIN = Plan()


class StepCosts:
    """Costs of steps of some number of sequences. draft_cost: of a draft model's step, until it is measured along with
    the verifying ones.
    """

    def __init__(self, draft_cost: float) -> None:
        self._draft_cost = draft_cost
        self._plain: deque[float] = deque(maxlen=_PLAIN_STEPS)  # seconds
        self._verifying: defaultdict[Plan, deque[float]] = defaultdict(_samples)
        self._breaks = _samples()
        self._made: set[Plan] = set()

    def note_plain(self, seconds: float) -> None:
        """Duration of a plain step in a full pipeline."""
        self._plain.append(seconds)

    def note_verified(self, plan: Plan, seconds: float) -> None:
        """Duration of a verifying step. The first of all is no sample: its shapes may be compiled."""
        if plain := self.plain_seconds:
            if plan in self._made:
                self._verifying[plan].append(seconds / plain)
            self._made.add(plan)

    def note_breaks(self, count: int, seconds: float) -> None:
        """Duration of the plain steps around so many breaks of the pipeline: one more than there are breaks."""
        if plain := self.plain_seconds:
            self._breaks.append((seconds / plain - (count + 1)) / count)

    @property
    def are_known(self) -> bool:
        """Whether enough plain steps are measured for any other to be compared with them."""
        return len(self._plain) >= _LEAST_PLAIN_STEPS

    @property
    def plain_seconds(self) -> float | None:
        """Duration of a plain step; None until it is known."""
        return median(self._plain) if self.are_known else None

    def is_measured(self, plan: Plan) -> bool:
        """Whether enough such verifying steps are measured."""
        return len(self._verifying[plan]) >= _LEAST_SAMPLES

    def of(self, plan: Plan, sizes: abc.Sequence[int]) -> float:
        """Cost of a verifying step. sizes: the tokens that such a step may have.

        Until it is measured, each more token is assumed to take as long as those of the next shorter step.
        """
        if self.is_measured(plan):
            return _usual(self._verifying[plan])
        for shorter in (Plan(size, plan.is_modelled) for size in reversed(sizes) if size < plan.tokens):
            if self.is_measured(shorter):
                longer = max(_usual(self._verifying[shorter]) - 1, 0)
                return 1 + longer / (shorter.tokens - 1) * (plan.tokens - 1)
        return 1 + (_ASSUMED_COST + (self._draft_cost if plan.is_modelled else 0)) * (plan.tokens - 1)

    @property
    def of_break(self) -> float:
        """Cost of a break of the pipeline; 0 until it is measured."""
        return max(0.0, _usual(self._breaks)) if len(self._breaks) >= _LEAST_SAMPLES else 0.0


def assumed_cost(tokens: int) -> float:
    """Cost of a step that verifies so many tokens of each sequence, before anything is measured."""
    return 1 + _ASSUMED_COST * (tokens - 1)


def _samples() -> deque[float]:
    return deque(maxlen=_SAMPLES)


def _usual(samples: abc.Collection[float]) -> float:
    """The median, the lower one of two: what else runs on the machine makes a step longer, never shorter."""
    return median_low(samples)
