"""Speculation where steps are compiled: tokens are drafted in shapes that the warm-up has computed, in no others."""

from dataclasses import replace

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.requests import Execution
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.scheduler.drafter import DraftModel
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.scheduler.speculation_controller import SIZES
from mlxserver.engine.scheduler.step_costs import Plan
from mlxserver.engine.scheduler.warm_up import DecodeShape, lengths_up_to
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.grammars import Even
from tests.support.speculation import COMPILED, FEW, asked, model, sampled
from tools.harness.models import tiny_llama

GREEDY_FEW = sampled(None, logit_bias=FEW, temperature=0.0)


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch):
    """A clock by which a plain step takes one second, and a verifying step two, of whatever number of tokens."""
    clock = 0.0

    def timed(step, seconds):
        def run(*arguments):
            nonlocal clock
            clock += seconds
            return step(*arguments)

        return run

    for name, seconds in (("advance", 1.0), ("verify", 2.0)):
        monkeypatch.setattr(SlotCache, name, timed(getattr(SlotCache, name), seconds))
    monkeypatch.setattr("mlxserver.engine.scheduler.step_times.perf_counter", lambda: clock)


class Traced:
    """A model whose calls are counted: a step that is compiled makes none, one that is to be compiled makes one."""

    def __init__(self, own):
        self._own, self.calls = own, 0

    def __getattr__(self, name):
        return getattr(self._own, name)

    def __call__(self, tokens, cache=None):
        self.calls += 1
        return self._own(tokens, cache=cache)


def scheduler(own, speculation="auto", **options):
    return Scheduler(own, speculation=speculation, **{"policy": COMPILED, "max_running": 8, **options})


def plain(*sequences):
    """Their tokens without speculation."""
    return Driver(scheduler(model(), "off", policy=CPU), *sequences).finish()


def verifying(shapes):
    return [shape for shape in shapes if isinstance(shape, DecodeShape) and shape.plan.tokens > 1]


class Recorder:
    """The shapes of the verifying steps that a scheduler makes, each once."""

    def __init__(self, own):
        self.shapes = set()
        cache = own._running.cache
        verify = cache.verify

        def recorded(tokens):
            self.shapes.add((cache.shape, tokens.shape[1]))
            return verify(tokens)

        cache.verify = recorded


def test_nothing_is_compiled_while_requests_run():
    """With a real compiler: one sequence that outgrows its slot, and two together."""
    own, metrics = Traced(model(num_hidden_layers=1)), ModelMetrics("")
    batch = scheduler(own, max_running=2, metrics=metrics)
    for _ in batch.warm_up(512):
        pass
    calls = own.calls
    alone = [sequence(1, prompt(200, 1), GREEDY_FEW, 120)]
    both = [sequence(n, prompt(100, n), sampled(n, logit_bias=FEW), 90) for n in (2, 3)]
    tokens = Driver(batch, *alone).finish() | Driver(batch, *both).finish()
    assert own.calls == calls
    assert metrics.accepted_tokens > 60
    off = Scheduler(model(num_hidden_layers=1), policy=CPU)
    assert tokens == Driver(off, *alone).finish() | Driver(off, *both).finish()


def test_tokens_are_the_same_after_any_part_of_the_warm_up_and_drafts_come_with_its_end(without_compilation):
    metrics, some = ModelMetrics(""), [replace(one, max_tokens=60) for one in asked(FEW)[:3]]
    batch = scheduler(model(), metrics=metrics)
    recorder, steps = Recorder(batch), batch.warm_up(1024)
    assert Driver(batch, *some).finish() == plain(*some)
    while not (rehearsed := {*recorder.shapes}):
        assert metrics.drafted_tokens == 0
        next(steps)
    assert Driver(batch, *some).finish() == plain(*some)
    assert recorder.shapes == rehearsed
    for _ in steps:
        pass
    rehearsed, before = {*recorder.shapes}, metrics.accepted_tokens
    assert Driver(batch, *some).finish() == plain(*some)
    assert recorder.shapes == rehearsed
    assert metrics.accepted_tokens > before


def test_sequences_of_every_kind_draft_in_shapes_of_the_warm_up_alone(without_compilation):
    metrics = ModelMetrics("")
    batch = scheduler(model(), metrics=metrics, max_running=3)
    recorder = Recorder(batch)
    for _ in batch.warm_up(1024):
        pass
    rehearsed = {*recorder.shapes}
    some = [sequence(n, prompt(length, n), sampled(n, logit_bias=FEW), 60)
            for n, length in enumerate((1000, 230, 40, 500, 1010, 700), 1)]  # fmt: skip
    some += [sequence(7, prompt(30, 7), GREEDY_FEW, 50), sequence(8, [5, 6] * 9, GREEDY_FEW, 30, constraint=Even())]
    assert Driver(batch, *some).finish() == plain(*[replace(one, constraint=one.constraint and Even()) for one in some])
    assert metrics.accepted_tokens > 10
    assert recorder.shapes == rehearsed


def test_verifying_steps_are_few_and_the_last_shapes_of_the_warm_up(without_compilation):
    shapes = [*scheduler(model(num_hidden_layers=1)).warm_up(1024)]
    last = verifying(shapes)
    assert shapes[-len(last) :] == last
    assert {(len(shape.lengths), shape.plan) for shape in last} == {
        (size, Plan(tokens)) for size in (1, 2, 4) for tokens in (SIZES[0], SIZES[-1])
    }
    assert [len(shape.lengths) for shape in last] == sorted(len(shape.lengths) for shape in last)
    assert len(last) == 3 * 2 * len(lengths_up_to(1024)) + 3 * 2  # and the shortest ones with greedy tokens


@pytest.mark.parametrize(
    ("speculation", "policy"),
    [
        ("off", COMPILED),
        ("always", COMPILED),
        ("auto", replace(COMPILED, compile_steps=False)),
        ("auto", replace(COMPILED, verifies=False)),
    ],
)
def test_where_no_step_waits_for_the_warm_up_it_has_no_verifying_ones(speculation, policy, without_compilation):
    assert not verifying(scheduler(model(), speculation, policy=policy).warm_up(512))


def test_a_model_that_is_loaded_drafts_behind_its_idle_steps(tmp_path, without_compilation):
    spec = ModelSpec("m", str(tiny_llama(tmp_path / "m", hidden=64, layers=1)), max_running=2, cache_tokens=512)
    metrics = ModelMetrics("m")
    runner = Builder(stall_target=10.0, policy=COMPILED).build(spec, metrics=metrics)
    assert runner.facts.execution == Execution("slots", padded_prefill=True, compiled=True, speculation=True)
    one = sequence(1, prompt(30), GREEDY_FEW, 90)
    before = Driver(runner.batch, one).finish()
    assert metrics.drafted_tokens == 0
    assert verifying([*runner.idle_steps])
    assert Driver(runner.batch, one).finish() == before
    assert metrics.accepted_tokens > 30
    runner.batch.close()


def test_a_draft_model_whose_own_steps_are_not_warmed_up_drafts_at_any_price_alone():
    draft = DraftModel("draft", model(), 4096, 1, COMPILED)
    for speculation, key in (("auto", None), ("always", "draft")):
        assert scheduler(model(), speculation, draft=draft).execution.draft == key


def test_auto_drafts_where_a_warm_up_computes_the_shapes_and_always_drafts_anywhere():
    unwarmed = replace(COMPILED, warm_up_all_batch_sizes=False)
    for speculation, policy, drafts in [
        ("off", COMPILED, False),
        ("auto", COMPILED, True),
        ("always", COMPILED, True),
        ("auto", unwarmed, False),
        ("always", unwarmed, True),
    ]:
        assert scheduler(model(), speculation, policy=policy).execution.speculation == drafts
