"""Controller of the speculation of one model: how many tokens of each sequence the next step verifies.

Rule 1: how often predictions are right is measured whether they are drafted or not; what a verifying step costs, and
        what a break of the pipeline before it (scheduler/step_times.py), is measured by a few of them, against plain
        steps of as many sequences.
Rule 2: a step drafts only where it is expected to give more tokens per second than a plain one.
"""

from __future__ import annotations

import math
from collections import Counter, abc
from collections.abc import Callable

from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.scheduler.drafting_rows import DraftingRow, EitherRow, Rows
from mlxserver.engine.scheduler.hit_rates import HitRates
from mlxserver.engine.scheduler.step_costs import PLAIN, Plan, StepCosts, assumed_cost

SIZES = (4, 8, 16)  # tokens of a sequence in a verifying step, the first of which is not drafted: few, for their shapes
REHEARSED = (SIZES[0], SIZES[-1])  # where each shape is compiled: a GPU takes hardly longer for the longest
_ALWAYS = 8  # where nothing is measured

_GAIN = 1.05  # least ratio of tokens per second to those of plain steps
_FIRST_RETRY, _RETRY = 64, 512  # steps that did not pay, after which one is tried all the same: each time twice as many
_READ_FOR_RETRY = 512  # most tokens that a draft model reads for that
_HELD_OFF = 256  # steps after one whose logits were not finite

_PRIOR_DRAFT_RATES = (0.6, 0.7, 0.8, 0.85)  # of a draft model, by how many of its last tokens were right
_ANSWER_TOKENS = 128  # that are left of an answer, if it may have as many: what reading a prompt pays off in


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
        self._costs: dict[int, StepCosts] = {}  # by number of sequences, a power of two
        self._declined: Counter[tuple[int, Plan]] = Counter()  # since such a step was made, likewise
        self._patience: dict[tuple[int, Plan], int] = {}  # how many are declined before one is tried, likewise
        self._held_off = 0

    def costs(self, sequences: int) -> StepCosts:
        """Costs of steps of so many sequences."""
        rounded = _rounded(sequences)
        if rounded not in self._costs:
            self._costs[rounded] = StepCosts(self.draft_cost)
        return self._costs[rounded]

    def cost(self, sequences: int, plan: Plan) -> float:
        """Cost of a verifying step of so many sequences."""
        return self.costs(sequences).of(plan, self._sizes(is_modelled=plan.is_modelled))

    def note_verified(self, sequences: int, plan: Plan, seconds: float | None) -> None:
        """A verifying step was made. seconds: its duration; None if it is not known."""
        kind = _rounded(sequences), plan
        was_tried = self._declined.pop(kind, 0) >= self._patience.get(kind, _FIRST_RETRY)
        self._patience[kind] = min(2 * self._patience.get(kind, _FIRST_RETRY), _RETRY) if was_tried else _FIRST_RETRY
        if seconds is not None:
            self.costs(sequences).note_verified(plan, seconds)

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
        *,
        breaks: bool = False,
    ) -> Plan:
        """Plan of the next step of so many sequences.

        rows: of those that may draft by lookup. modelled: of all that may draft, where a draft model could. fits:
        whether so many tokens have room. most_cost: of any but the shortest verifying step. breaks: whether a verifying
        step would break the pipeline.
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
        costs = self.costs(sequences)
        if not costs.are_known:
            return PLAIN
        lost = costs.of_break if breaks else 0.0
        offers = [self._best(sequences, rows, fits, most_cost, lost, is_modelled=False)]
        offers += [self._best(sequences, modelled, fits, most_cost, lost, is_modelled=True)] if modelled else []
        best, gain = max(offers, key=lambda offer: offer[1])
        return best if gain > _GAIN else self._retried(sequences, rows, fits, has_model=bool(modelled))

    def may_read(self, sequences: int, modelled: abc.Sequence[EitherRow], tokens: int, token_seconds: float) -> bool:
        """Whether it pays that a draft model reads so many tokens, for these rows to draft with it."""
        if self._always:
            return True
        if self._held_off or not (plain := self.costs(sequences).plain_seconds):
            return False
        _, gain = self._best(sequences, modelled, lambda size: True, math.inf, 0.0, is_modelled=True)
        if gain <= _GAIN:
            return self._is_due(sequences, Plan(self._draft_sizes[0], is_modelled=True)) and tokens <= _READ_FOR_RETRY
        left = max((min(row.model.most, _ANSWER_TOKENS) for row in modelled if row.model), default=0)
        return tokens * token_seconds < left * plain * (1 - 1 / gain)

    def _best(
        self,
        sequences: int,
        rows: Rows,
        fits: Callable[[int], bool],
        most_cost: float,
        lost: float,
        *,
        is_modelled: bool,
    ) -> tuple[Plan, float]:
        """The plan with the largest expected ratio of tokens per second to those of a plain step, and that ratio.

        lost: in plain steps, before it is known whether any row drafts.
        """
        best, most = PLAIN, 1.0
        costs, sizes = self.costs(sequences), self._sizes(is_modelled=is_modelled)
        likely = 1 - math.prod(1 - row.chance for row in rows)
        for tokens in filter(fits, sizes):
            plan = Plan(tokens, is_modelled)
            cost = costs.of(plan, sizes)
            if tokens > sizes[0] and lost + cost > most_cost:
                break
            accepted = sum(row.accepted(tokens) for row in rows)
            gain = (1 + accepted / sequences) / (lost + 1 + likely * (cost - 1))
            if gain > most:
                best, most = plan, gain
            if not costs.is_measured(plan):
                break  # a longer one costs more
        return best, most

    def _retried(
        self, sequences: int, rows: abc.Sequence[DraftingRow], fits: Callable[[int], bool], *, has_model: bool
    ) -> Plan:
        """The shortest step now and then: by lookup if it would pay at the cost that is assumed at first; else by a
        draft model, whose rates are measured by nothing else.
        """
        tokens = SIZES[0]
        accepted = sum(row.accepted(tokens) for row in rows)
        if 1 + accepted / sequences > _GAIN * assumed_cost(tokens):
            plan = Plan(tokens)
        elif has_model:
            plan = Plan(self._draft_sizes[0], is_modelled=True)
        else:
            return PLAIN
        return plan if fits(plan.tokens) and self._is_due(sequences, plan) else PLAIN

    def _is_due(self, sequences: int, plan: Plan) -> bool:
        """Count a step that was declined. Returns whether it is to be tried all the same, until it is made."""
        kind = _rounded(sequences), plan
        self._declined[kind] += 1
        return self._declined[kind] >= self._patience.get(kind, _FIRST_RETRY)

    def _sizes(self, *, is_modelled: bool) -> abc.Sequence[int]:
        """Tokens of a verifying step."""
        return self._draft_sizes if is_modelled else SIZES


def _rounded(sequences: int) -> int:
    return 1 << (sequences - 1).bit_length()
