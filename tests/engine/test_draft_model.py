"""Draft models: a smaller model drafts, the other one verifies, and nothing about what is generated changes."""

from dataclasses import replace

import pytest

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.quantized import KVFormat
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.scheduler.drafter import DraftModel
from mlxserver.engine.scheduler.drafting_rows import DraftingRow, EitherRow
from mlxserver.engine.scheduler.hit_rates import HitRates
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.scheduler.speculation_controller import SpeculationController
from mlxserver.engine.scheduler.step_costs import Plan
from tests.support.batch_driver import GREEDY, Driver, prompt, sequence, with_chunk_times
from tests.support.prefixes import new_prefixes
from tests.support.speculation import PADDED, asked, fits, model, sampled


def drafting(own, weight_bytes=1, context_length=4096):
    """A draft model; by default its steps are expected to cost nothing."""
    return DraftModel("draft", own, context_length, weight_bytes, CPU)


ALIKE = drafting(model())
OTHER = drafting(model(hidden_size=64, num_hidden_layers=1))


class Wrapped:
    """A model that computes what another one does."""

    def __init__(self, own):
        self._own = own

    def __getattr__(self, name):
        return getattr(self._own, name)

    def __call__(self, tokens, cache=None):
        return self._own(tokens, cache=cache)


def scheduler(own=None, speculation="always", draft=ALIKE, **options):
    own = own or model()
    return Scheduler(own, speculation=speculation, draft=draft, **{"policy": CPU, **options})


def run(*sequences, **options):
    return Driver(scheduler(**options), *sequences).finish()


def plain(*sequences, **options):
    return run(*sequences, speculation="off", draft=None, **options)


@pytest.mark.parametrize("policy", [CPU, PADDED], ids=["slots", "padded"])
@pytest.mark.parametrize("draft", [ALIKE, OTHER], ids=["alike", "other"])
def test_tokens_are_the_same_with_a_draft_model_and_without(policy, draft):
    metrics = ModelMetrics("")
    tokens = run(*asked(), draft=draft, policy=policy, metrics=metrics)
    assert tokens == plain(*asked(), policy=policy)
    assert [len(tokens[one.id]) for one in asked()] == [one.max_tokens for one in asked()]
    assert metrics.drafted_tokens > 60
    assert (metrics.accepted_tokens > 30) == (draft is ALIKE)


def test_quantised_kv_caches_of_both_are_in_the_batch():
    own = model(kv=KVFormat(8, 64))
    metrics = ModelMetrics("")
    assert run(*asked(), own=own, draft=drafting(own), metrics=metrics) == plain(*asked(), own=own)
    assert metrics.accepted_tokens > 30


def test_a_draft_that_is_the_same_model_is_nearly_always_right():
    metrics, without = ModelMetrics(""), ModelMetrics("")
    one = sequence(1, prompt(20), GREEDY, 150)
    assert run(one, metrics=metrics) == plain(one, metrics=without)
    assert metrics.accepted_tokens > 0.9 * metrics.drafted_tokens
    assert metrics.batch_size.count < without.batch_size.count / 3


def test_prompts_are_read_in_chunks_between_the_steps():
    driver = Driver(scheduler(stall_target=0.001), sequence(1, prompt(400), GREEDY, 60))
    drafter = driver.scheduler._running._speculation.drafts._drafter
    with_chunk_times(drafter._prefill)
    driver.until_generated(1, 1)
    seen = []
    driver.until(lambda: seen.append((len(driver.tokens[1]), bool(drafter._reading))) or drafter._rows)
    assert sum(is_reading for _, is_reading in seen) > 2
    assert driver.finish() == plain(sequence(1, prompt(400), GREEDY, 60))


def test_choices_of_one_prompt_share_its_reading():
    metrics = ModelMetrics("")
    choices = [sequence(n, prompt(60), sampled(n, top_k=2), 40) for n in (1, 2, 3)]
    driver = Driver(scheduler(metrics=metrics))
    driver.add_choices(*choices)
    drafter = driver.scheduler._running._speculation.drafts._drafter
    driver.until(lambda: drafter._rows)
    assert [row.running.sequence.id for row in drafter._rows] == [1, 2, 3]
    tokens = driver.finish()
    other = Driver(scheduler(speculation="off", draft=None))
    other.add_choices(*choices)
    assert tokens == other.finish()
    assert metrics.accepted_tokens > 5


def test_sequences_join_leave_and_are_cancelled_beside_drafts():
    driver = Driver(scheduler(max_running=3, prefixes=new_prefixes()), *asked()[:4])
    driver.until_generated(2, 12)
    driver.scheduler.remove([1])
    driver.add(*asked()[4:])
    tokens = driver.finish()
    expected = plain(*asked())
    assert {id: own for id, own in tokens.items() if id != 1} == {n: own for n, own in expected.items() if n != 1}
    assert tokens[1] == expected[1][: len(tokens[1])]
    assert not driver.scheduler._running._speculation.drafts._drafter._rows


def test_sequences_that_are_preempted_resume_with_the_same_tokens():
    some = [sequence(n, prompt(230, n), sampled(n), 40) for n in (1, 2)]
    assert run(*some, max_kv_tokens=600, prefixes=new_prefixes()) == plain(*some)


def test_a_restart_drops_what_the_draft_model_has():
    driver = Driver(scheduler(), *asked()[:3])
    driver.until_generated(2, 10)
    for token in driver.scheduler.restart([1, 2, 3]):
        driver.tokens[token.sequence_id].append(token.token)
    assert not driver.scheduler._running._speculation.drafts._drafter._rows
    assert driver.finish() == plain(*asked()[:3])


def test_a_prompt_that_goes_on_from_an_earlier_one_is_not_read_again():
    prefixes = new_prefixes()
    driver = Driver(scheduler(draft=replace(ALIKE, prefixes=prefixes)), sequence(1, prompt(300), GREEDY, 40))
    first = driver.finish()[1]
    longer = (*prompt(300), *first, *prompt(20, 9))
    assert prefixes.length(longer) > 320
    drafter = driver.scheduler._running._speculation.drafts._drafter
    advance, begun_at = drafter._prefill.advance, []
    drafter._prefill.advance = lambda prompts, budget: begun_at.append(prompts[0].done) or advance(prompts, budget)
    driver.add(sequence(2, longer, GREEDY, 40))
    assert driver.finish()[2] == plain(sequence(2, longer, GREEDY, 40))[2]
    assert begun_at[0] > 320
    driver.scheduler.restart(())
    assert prefixes.nbytes == 0


def test_its_slots_never_hold_more_than_those_of_the_batch():
    driver = Driver(scheduler(), *[sequence(n, prompt(length, n), GREEDY, 60) for n, length in
                                   enumerate((1000, 230, 1010, 40, 500, 2040))])  # fmt: skip
    running = driver.scheduler._running
    drafter = running._speculation.drafts._drafter
    most = 0

    def is_done():
        nonlocal most
        assert drafter._cache.held_tokens <= running.cache.held_tokens
        most = max(most, drafter._cache.held_tokens)
        return driver.scheduler.is_empty()

    driver.until(is_done)
    assert most > 1000
    assert caches.cache_sizes(model()).with_draft(model()).per_token == 2 * caches.cache_sizes(model()).per_token


def test_log_probabilities_are_those_of_each_token():
    def recorded(**options):
        own, tokens = scheduler(**options), []
        own.insert([sequence(1, prompt(20), sampled(3), 40, top_logprobs=2)])
        while len(tokens) < 40:
            tokens += own.decode()
            own.prefill()
        return tokens

    got, expected = recorded(), recorded(speculation="off", draft=None)
    for own, other in zip(got, expected, strict=False):
        assert own.token == other.token
        assert own.logprobs.chosen == pytest.approx(other.logprobs.chosen, abs=1e-3)
        assert [token for token, _ in own.logprobs.top] == [token for token, _ in other.logprobs.top]


def test_a_draft_whose_context_ends_drafts_no_more():
    metrics = ModelMetrics("")
    one = sequence(1, prompt(20), GREEDY, 100)
    assert run(one, draft=drafting(model(), context_length=60), metrics=metrics) == plain(one)
    assert 10 < metrics.accepted_tokens < 60


def test_a_draft_of_fewer_or_more_embeddings_drafts_what_both_have():
    one = sequence(1, prompt(20), SamplingParams(temperature=0.0, logit_bias={298: 90.0, 5: 89.0}), 30)
    for vocab_size in (200, 400):
        smaller = drafting(model(vocab_size=vocab_size))
        assert run(one, draft=smaller) == plain(one)


def test_a_draft_that_overflows_drafts_no_more():
    """It has drafted before, and most of the answers is still to come."""

    class Overflowing(Wrapped):
        num_drafted = 0
        fails = False

        def __call__(self, tokens, cache=None):
            logits = super().__call__(tokens, cache=cache)
            self.num_drafted += tokens.shape[1] == 1
            return logits * float("inf") if self.fails else logits

    own, sequences = Overflowing(model()), [replace(one, max_tokens=150) for one in asked()[:3]]
    driver = Driver(scheduler(draft=drafting(own)), *sequences)
    driver.until(lambda: own.num_drafted > 7)
    own.fails = True
    assert driver.finish() == plain(*sequences)
    assert not driver.scheduler._running._speculation.drafts._drafter._is_usable


def test_auto_drafts_in_vain_only_for_a_short_time(monkeypatch):
    """By a clock of its own: a busy machine makes single steps long, by which no draft is worth less."""
    metrics, clock = ModelMetrics(""), [0.0]

    class Timed(Wrapped):
        def __call__(self, tokens, cache=None):
            clock[0] += 1.0 + 0.1 * (tokens.shape[1] - 1)
            return super().__call__(tokens, cache=cache)

    monkeypatch.setattr("mlxserver.engine.scheduler.step_times.perf_counter", lambda: clock[0])
    one = sequence(1, prompt(20), sampled(1), 200)
    other = drafting(Timed(model(hidden_size=64, num_hidden_layers=1)))
    assert run(one, own=Timed(model()), draft=other, metrics=metrics, speculation="auto") == plain(one)
    assert 0 < metrics.drafted_tokens < 60


# The controller


def controller(costs=(), draft_cost=0.1):
    """A controller that has measured plain steps of a second, and the costs of others."""
    own = SpeculationController(ModelMetrics(""), draft_cost=draft_cost)
    for _ in range(3):
        own.costs(1).note_plain(1.0)
    for plan, ratio in costs:
        for _ in range(3):
            own.note_verified(1, plan, ratio)
    return own


def row(own, streak=0, lookup=None):
    return EitherRow(lookup, DraftingRow(streak, 100, own.draft_rates))


def test_the_draft_model_drafts_where_lookup_predicts_nothing():
    own = controller()
    assert own.choose(1, [], fits, [row(own)]) == Plan(4, is_modelled=True)
    copying = DraftingRow(40, 100, own.rates)
    assert own.choose(1, [copying], fits, [row(own, lookup=copying)]) == Plan(4)
    assert not row(own, lookup=copying).prefers_model(4)
    assert row(own, lookup=DraftingRow(3, 100, own.rates)).prefers_model(4)


def test_an_expensive_draft_model_drafts_nothing():
    own = controller(draft_cost=0.9)
    assert own.choose(1, [], fits, [row(own)]).tokens == 1
    assert not own.may_read(1, [row(own)], 10, 0.001)


def test_a_draft_model_that_is_wrong_is_switched_off_and_tried_again_after_a_while():
    own = controller(costs=[(Plan(4, is_modelled=True), 1.5)])
    assert own.choose(1, [], fits, [row(own)]).is_modelled
    for _ in range(30):
        own.draft_rates.note(0, False)
    chosen = []
    for _ in range(1100):
        chosen.append(own.choose(1, [], fits, [row(own)]))
        if chosen[-1].is_modelled:
            own.note_verified(1, chosen[-1], 1.5)
    assert sum(plan.is_modelled for plan in chosen) == 4
    assert not any(own.may_read(1, [row(own)], 10, 0.001) for _ in range(300))


def test_a_long_prompt_is_read_only_if_its_answer_may_pay_that_off():
    own = controller(costs=[(Plan(4, is_modelled=True), 1.5)])
    assert own.may_read(1, [row(own)], 1000, 0.001)
    assert not own.may_read(1, [row(own)], 100_000, 0.001)
    short = EitherRow(None, DraftingRow(0, 1, HitRates(own.draft_rates)))
    assert not own.may_read(1, [short], 1000, 0.01)
