"""Times of steps on a device and a host of given speeds: what a verifying step costs, and what breaks the pipeline."""

from contextlib import contextmanager
from itertools import pairwise

import pytest

from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.scheduler.drafting_rows import DraftingRow
from mlxserver.engine.scheduler.drafts import Drafts
from mlxserver.engine.scheduler.hit_rates import HitRates
from mlxserver.engine.scheduler.prompt_lookup import PromptLookup
from mlxserver.engine.scheduler.running import RunningSequence
from mlxserver.engine.scheduler.speculation_controller import SIZES, SpeculationController
from mlxserver.engine.scheduler.step_costs import Plan
from mlxserver.engine.scheduler.step_times import StepTimes
from tests.support.batch_driver import sequence
from tests.support.speculation import fits

FOUR = Plan(4)
SPEEDS = {"device-bound": (1.5, 2.0), "host-bound": (2.0, 0.75), "no launch": (0.0, 2.0)}  # of a launch, and a step
VERIFYING = 3.0


class Machine:
    """A host that launches steps, and a device that computes them one after the other. All in seconds."""

    def __init__(self, monkeypatch, launch, step):
        self.clock = self._done = 0.0
        self._launch, self._step = launch, step
        monkeypatch.setattr("mlxserver.engine.scheduler.step_times.perf_counter", lambda: self.clock)
        self.controller = SpeculationController(ModelMetrics(""))
        self.times = StepTimes(self.controller)

    @property
    def plain_seconds(self):
        """Of a step in a full pipeline."""
        return max(self._launch, self._step)

    def _compute(self, launch, step):
        self.clock += launch
        self._done = max(self._done, self.clock) + step

    def wait(self, done):
        self.clock = max(self.clock, done)

    @contextmanager
    def _reading(self):
        with self.times.reading():
            self.wait(self._done)
        yield

    def run(self, steps):
        """Plain steps (P), verifying ones (V), and plain ones before which tokens were read in vain (R)."""
        for step in steps:
            before = self._done
            if step == "V":
                with self._reading():
                    self._compute(self._launch, VERIFYING)
                self.wait(self._done)
                self.times.note_verifying(1, FOUR)
            elif step == "R" or self.times.is_read:
                with self._reading():
                    self._compute(self._launch, self._step)
                self.times.note_plain(1)
            else:
                self._compute(self._launch, self._step)
                self.wait(before)
                self.times.note_plain(1)
        return self.clock


@pytest.fixture(params=SPEEDS, ids=str)
def machine(request, monkeypatch):
    own = Machine(monkeypatch, *SPEEDS[request.param])
    own.run("PPPPPPPPPP")
    return own


@pytest.mark.parametrize("steps", ["VPPP", "VVVPPP", "VPVPPP", "RPPP", "VRVPVVPPP"])
def test_verifying_steps_and_breaks_cost_what_the_steps_take_longer(machine, steps):
    costs, lost = machine.controller.costs(1), []
    for _ in range(3):
        start = machine.clock
        lost.append((machine.run(steps) - start) / machine.plain_seconds - steps.count("P") - steps.count("R"))
    breaks = sum(step != "P" and before != "V" for before, step in pairwise("P" + steps))
    expected = breaks * costs.of_break + steps.count("V") * (costs.of(FOUR, [4]) if "V" in steps else 0)
    assert lost == pytest.approx([expected] * 3)
    assert costs.plain_seconds == pytest.approx(machine.plain_seconds)


def test_a_break_costs_nothing_where_a_launch_takes_no_time(monkeypatch):
    own = Machine(monkeypatch, 0.0, 2.0)
    own.run("PPPPPP" + "VPPP" * 3)
    assert own.controller.costs(1).of_break == pytest.approx(0.0)
    assert own.controller.cost(1, FOUR) == pytest.approx(VERIFYING / 2.0)


def test_a_step_behind_something_else_is_no_sample(machine):
    costs = machine.controller.costs(1)
    machine.run("VPPVPPVPP")
    known = costs.plain_seconds, costs.of_break, machine.controller.cost(1, FOUR)
    for steps in ("V", "VP", "R", "P", "PV", "PR") * 5:
        machine.times.pause()
        machine.clock += 100.0
        machine.wait(machine._done)
        machine.run(steps)
        machine.times.pause()
    assert (costs.plain_seconds, costs.of_break, machine.controller.cost(1, FOUR)) == known


# What the controller makes of it


def controller(of_break, verifying=1.43):
    own = SpeculationController(ModelMetrics(""))
    for _ in range(5):
        own.costs(1).note_plain(2.1)
    for _ in range(3):
        own.costs(1).note_breaks(1, 2.1 * (2 + of_break))
        for tokens in SIZES:
            own.note_verified(1, Plan(tokens), 2.1 * verifying)
    return own


def pending(streak, is_pending=True):
    return DraftingRow(streak, 100, HitRates(), is_pending)


def test_a_break_of_the_pipeline_has_to_pay_off():
    cheap, dear = controller(0.0), controller(1.5)
    assert cheap.choose(1, [pending(5)], fits, breaks=True).tokens > 1
    assert dear.choose(1, [pending(5)], fits, breaks=True).tokens == 1
    assert dear.choose(1, [pending(20)], fits, breaks=True).tokens == 16


def test_what_a_break_has_cost_is_lost_whatever_comes_next():
    dear = controller(0.7)
    assert dear.choose(1, [pending(5, is_pending=False)], fits).tokens > 1
    assert dear.choose(1, [pending(3, is_pending=False)], fits).tokens == 1


def test_a_token_that_is_not_read_has_to_be_as_predicted():
    rates = HitRates(priors=(0.5, 0.5, 0.5, 0.5))
    read, unread = DraftingRow(3, 100, rates), DraftingRow(3, 100, rates, is_pending=True)
    assert (read.chance, unread.chance) == (1.0, 0.5)
    assert unread.accepted(4) == 0.5 * read.accepted(4)


@pytest.mark.parametrize("of_break", [0.0, 0.7, 3.0])
def test_tokens_that_are_read_in_vain_cost_a_sequence_little(of_break):
    """They are as predicted until the pipeline is broken for them, and then never."""
    drafts = Drafts(controller(of_break), None, is_forced=False)
    running = RunningSequence(sequence(1, [3] * 50, max_tokens=10_000), 0, 0.0)
    running.lookup, running.hit_rates = PromptLookup([3] * 50), HitRates(priors=(0.99,) * 4)
    lost, steps = 0.0, 1000
    for _ in range(steps):
        if drafts.plan([running], fits, is_pending=True).tokens > 1:
            assert drafts.predicted([running]) == [running]
            drafts.note_break([running], 1)
            lost += of_break
        drafts.add_credit(running)
    assert lost < 1 + of_break + 0.005 * steps
