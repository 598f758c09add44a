"""Speculation: drafted tokens are verified together, and change nothing about what is generated."""

from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.kv_cache.quantized import KVFormat
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.scheduler.drafting_rows import DraftingRow
from mlxserver.engine.scheduler.drafts import Drafts
from mlxserver.engine.scheduler.hit_rates import HitRates
from mlxserver.engine.scheduler.prompt_lookup import PromptLookup
from mlxserver.engine.scheduler.running import RunningSequence
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.scheduler.speculation_controller import SIZES, SpeculationController
from mlxserver.engine.scheduler.step_costs import Plan
from tests.support.architectures import random_model
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.grammars import Even
from tests.support.prefixes import new_prefixes
from tests.support.speculation import FEW, PADDED, asked, fits, model, sampled

GREEDY_FEW = SamplingParams(temperature=0.0, logit_bias=FEW)


def few(seed, **settings):
    return sampled(seed, logit_bias=FEW, **settings)


def scheduler(own, speculation="always", metrics=None, **options):
    return Scheduler(own, speculation=speculation, metrics=metrics, **{"policy": CPU, **options})


def run(own, *sequences, **options):
    return Driver(scheduler(own, **options), *sequences).finish()


def test_what_followed_the_same_tokens_is_predicted():
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 9, 1, 2])
    assert (lookup.draft(4), lookup.streak) == ([], 0)
    assert lookup.append(3) is None
    assert (lookup.draft(4), lookup.streak) == ([4, 5, 6, 7], 3)
    assert lookup.append(4) is True
    assert (lookup.draft(2), lookup.streak) == ([5, 6], 4)
    assert lookup.append(8) is False
    assert (lookup.draft(3), lookup.streak) == ([], 0)


def test_the_last_place_is_the_one_that_counts():
    lookup = PromptLookup([1, 2, 3, 4, 1, 2, 3, 5, 0, 1, 2, 3])
    assert lookup.draft(1) == [5]
    for token in (6, 1, 2, 3):
        lookup.append(token)
    assert lookup.draft(1) == [6]


def test_what_repeats_itself_is_predicted_to_go_on():
    assert PromptLookup([8, 1, 2, 1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]
    assert PromptLookup([3, 3, 3, 3]).draft(3) == [3, 3, 3]


def test_a_quotation_goes_on_near_the_place_where_it_broke_off():
    lines = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 1, 2, 3, 20, 21]
    lookup = PromptLookup([*lines, 0, 1, 2, 3, 99, 10, 11, 12])
    for token in (13, 14, 15, 16, 17, 18, 55, 1, 2):
        lookup.append(token)
    lookup.append(3)
    assert lookup.draft(2) == [20, 21]


@pytest.mark.parametrize("length", range(5))
def test_a_short_prompt_predicts_nothing(length):
    assert PromptLookup(range(length)).draft(3) == []


@pytest.mark.parametrize("policy", [CPU, PADDED], ids=["slots", "padded"])
@pytest.mark.parametrize("kv", [None, KVFormat(8, 64)], ids=["plain", "quantized"])
def test_tokens_are_the_same_with_speculation_and_without(policy, kv):
    metrics = ModelMetrics("")
    tokens = run(model(kv=kv), *asked(FEW), policy=policy, metrics=metrics)
    assert tokens == run(model(kv=kv), *asked(FEW), policy=policy, speculation="off")
    assert [len(tokens[one.id]) for one in asked(FEW)] == [one.max_tokens for one in asked(FEW)]
    assert metrics.drafted_tokens > metrics.accepted_tokens > 20


def test_sequences_join_and_leave_a_batch_that_speculates():
    tokens = run(model(), *asked(FEW), max_running=3, prefixes=new_prefixes())
    assert tokens == run(model(), *asked(FEW), speculation="off")


def test_fewer_steps_are_made():
    metrics, plain = ModelMetrics(""), ModelMetrics("")
    one = sequence(1, prompt(20), SamplingParams(temperature=0.0, logit_bias={5: 90.0}), 100)
    assert run(model(), one, metrics=metrics) == run(model(), one, metrics=plain, speculation="off")
    assert metrics.batch_size.count < plain.batch_size.count / 3


def test_sequences_that_are_preempted_resume_with_the_same_tokens():
    asked = [sequence(n, prompt(230, n), few(n), 50) for n in (1, 2)]
    assert run(model(), *asked, max_kv_tokens=600, prefixes=new_prefixes()) == run(model(), *asked, speculation="off")


def test_log_probabilities_are_those_of_each_token():
    class Recorder(Driver):
        logprobs: list = []

        def step(self):
            decode = self.scheduler.decode

            def recorded():
                tokens = decode()
                self.logprobs += [(token.token, token.logprobs) for token in tokens]
                return tokens

            self.scheduler.decode = recorded
            super().step()
            self.scheduler.decode = decode

    def recorded(speculation):
        driver = Recorder(scheduler(model(), speculation))
        driver.logprobs = []
        driver.add(sequence(1, prompt(20), few(3), 40, top_logprobs=2))
        driver.finish()
        return driver.logprobs

    got, expected = recorded("always"), recorded("off")
    assert [token for token, _ in got] == [token for token, _ in expected]
    for (_, own), (_, other) in zip(got, expected, strict=True):
        assert own.chosen == pytest.approx(other.chosen, abs=1e-3)
        assert [token for token, _ in own.top] == [token for token, _ in other.top]


def test_a_sequence_with_a_grammar_drafts_nothing_and_is_in_the_batch():
    metrics, constraint = ModelMetrics(""), Even()
    alone = run(model(), sequence(1, [5, 6] * 9, GREEDY_FEW, 30, constraint=Even()), metrics=metrics)
    assert metrics.drafted_tokens == 0
    both = [sequence(1, [5, 6] * 9, GREEDY_FEW, 30, constraint=constraint), sequence(2, prompt(30), few(2), 60)]
    tokens = run(model(), *both, metrics=metrics)
    assert metrics.accepted_tokens > 0
    assert tokens[1] == alone[1] == constraint.accepted
    assert tokens[2] == run(model(), sequence(2, prompt(30), few(2), 60), speculation="off")[2]


@pytest.mark.parametrize("name", ["gemma3_text", "nemotron_h"])
def test_a_model_whose_tokens_cannot_be_taken_back_drafts_nothing(name):
    metrics = ModelMetrics("")
    own = random_model(name)
    one = sequence(1, prompt(20), SamplingParams(temperature=0.0, logit_bias={5: 900.0}), 12)
    assert run(own, one, metrics=metrics)[1] == [5] * 12
    assert metrics.drafted_tokens == 0


class Overflowing:
    """A model that overflows at one token."""

    def __init__(self, own, token):
        self._own, self._token = own, token

    def __getattr__(self, name):
        return getattr(self._own, name)

    def __call__(self, tokens, cache=None):
        embedding = self._own.model.embed_tokens
        weight = embedding.weight
        embedding.weight = mx.where(mx.arange(weight.shape[0])[:, None] == self._token, mx.inf, weight)
        try:
            return self._own(tokens, cache=cache)
        finally:
            embedding.weight = weight


@pytest.mark.parametrize("policy", [CPU, PADDED], ids=["slots", "padded"])
def test_a_drafted_token_at_which_the_model_overflows_does_no_harm(policy):
    """Sequence 1 drafts it at every chance; the others are beside it."""
    asked = [sequence(n, prompt(20, n), few(n), 20) for n in (1, 2)]
    driver = Driver(scheduler(Overflowing(model(), 301), policy=policy))
    speculation = driver.scheduler._running._speculation

    class Wrong(PromptLookup):
        def draft(self, most):
            return [301] * most

        streak = 3

    speculation.lookup = lambda one: Wrong(one.tokens) if one.id == 1 else PromptLookup(one.tokens)
    speculation.controller.hold_off = lambda: None
    driver.add(*asked)
    assert driver.finish() == run(model(), *asked, speculation="off")


def test_a_model_that_computes_several_tokens_otherwise_drafts_nothing():
    class Careless(Overflowing):
        def __call__(self, tokens, cache=None):
            logits = self._own(tokens, cache=cache)
            return logits[..., ::-1] if tokens.shape[1] == SIZES[0] else logits

    assert fitting_policy(model(), CPU, "right") == CPU
    policy = fitting_policy(Careless(model(), None), CPU, "careless")
    assert policy == replace(CPU, verifies=False)
    own, metrics, one = Careless(model(), None), ModelMetrics(""), sequence(1, prompt(21), GREEDY_FEW, 30)
    assert not scheduler(own, policy=policy).execution.speculation
    assert run(own, one, policy=policy, metrics=metrics) == run(model(), one, speculation="off")
    assert metrics.drafted_tokens == 0


def row(streak, most, rates=None):
    return DraftingRow(streak, most, rates or HitRates())


def controller(costs=(), sequences=1):
    """A controller that has measured plain steps of a second, and the costs of others."""
    own = SpeculationController(ModelMetrics(""))
    for _ in range(3):
        own.costs(sequences).note_plain(1.0)
    for tokens, ratio in costs:
        for _ in range(3):
            own.note_verified(sequences, Plan(tokens), ratio)
    return own


def test_a_step_drafts_where_that_is_faster():
    cheap = controller(costs=[(4, 1.2), (8, 1.3), (16, 1.5)])
    assert cheap.choose(1, [row(40, 100)], fits).tokens == 16
    assert cheap.choose(1, [row(40, 100)], lambda tokens: tokens < 9).tokens == 8
    assert cheap.choose(1, [row(40, 1)], fits).tokens == 4
    assert cheap.choose(1, [], fits).tokens == 1
    assert controller(costs=[(4, 4.5)]).choose(1, [row(40, 100)], fits).tokens == 1
    assert controller(costs=[(4, 1.2), (8, 2.4)]).choose(1, [row(40, 100)], fits).tokens == 4


def test_a_step_that_something_else_made_longer_does_not_count_for_good():
    own = controller()
    for ratio in (1.2, 9.0, 1.3):
        own.note_verified(1, Plan(4), ratio)
    assert own.choose(1, [row(40, 100)], fits).tokens > 1


def test_nothing_is_drafted_before_plain_steps_are_measured():
    assert SpeculationController(ModelMetrics("")).choose(1, [row(40, 100)], fits).tokens == 1


def test_longer_drafts_are_tried_once_shorter_ones_are_measured():
    assert controller().choose(1, [row(40, 100)], fits).tokens == 4
    assert controller(costs=[(4, 1.1)]).choose(1, [row(40, 100)], fits).tokens == 8


def test_predictions_that_prove_wrong_are_drafted_no_more():
    own = controller(costs=[(4, 1.3)])
    assert own.choose(1, [row(5, 100, own.rates)], fits).tokens > 1
    for _ in range(40):
        own.rates.note(5, False)
    assert own.choose(1, [row(5, 100, own.rates)], fits).tokens == 1
    assert own.choose(1, [row(40, 100, own.rates)], fits).tokens > 1


def test_predictions_that_prove_right_are_drafted_from_their_first_token_on():
    own = controller(costs=[(4, 1.3)])
    assert own.choose(1, [row(3, 100, own.rates)], fits).tokens == 1
    for _ in range(40):
        own.rates.note(3, True)
    assert own.choose(1, [row(3, 100, own.rates)], fits).tokens > 1


def test_a_sequence_whose_predictions_prove_wrong_drafts_no_more_beside_one_that_copies():
    own = controller(costs=[(4, 1.6)])
    editing, telling = HitRates(own.rates), HitRates(own.rates)
    for _ in range(40):
        editing.note(3, True)
    assert own.choose(1, [row(3, 100, telling)], fits).tokens > 1
    for _ in range(6):
        telling.note(3, False)
    assert own.choose(1, [row(3, 100, telling)], fits).tokens == 1
    assert own.choose(1, [row(3, 100, editing)], fits).tokens > 1


def test_many_sequences_draft_only_if_enough_of_them_do():
    own = controller(sequences=8, costs=[(4, 1.6)])
    assert own.choose(8, [row(40, 100)], fits).tokens == 1
    assert own.choose(8, [row(40, 100)] * 8, fits).tokens > 1


def test_a_step_that_did_not_pay_is_tried_again_after_a_while_and_then_after_longer_ones():
    own = controller(costs=[(4, 4.5)])
    declined = [0]
    while len(declined) < 7:
        plan = own.choose(1, [row(40, 100)], fits)
        declined[-1] += plan.tokens == 1
        if plan.tokens > 1:
            assert own.choose(1, [row(40, 100)], fits) == plan  # until it is made
            own.note_verified(1, plan, 4.5)
            declined.append(0)
    assert declined[:-1] == [63, 127, 255, 511, 511, 511]


def test_a_step_that_was_dear_for_once_is_tried_until_it_is_not():
    own = controller(costs=[(4, 9.0)])
    made = 0
    for _ in range(1000):
        if (plan := own.choose(1, [row(40, 100)], fits)).tokens > 1:
            own.note_verified(1, plan, 1.3)
            made += 1
    assert made > 500


def promising():
    """A sequence whose predictions are expected to be right."""
    running = RunningSequence(sequence(1, [3] * 50, max_tokens=10_000), 0, 0.0)
    running.lookup, running.hit_rates = PromptLookup([3] * 50), HitRates()
    for streak in (3, 6, 10, 20) * 50:
        running.hit_rates.note(streak, True)
    return running


def drafted(drafts, running, right):
    """Tokens of the next step, which is noted as if its drafts were all right, or all wrong."""
    plan = drafts.plan([running], fits)
    if plan.tokens > 1:
        draft = running.lookup.draft(plan.tokens - 1)
        drafts.note([running], plan, [draft], [len(draft) if right else 0], ())
    drafts.add_credit(running)
    return plan.tokens


COSTS = [(4, 1.8), (8, 2.5), (16, 4.0)]


def test_drafts_that_are_never_right_cost_a_sequence_little():
    drafts, running = Drafts(controller(COSTS), None, is_forced=False), promising()
    chosen = [drafted(drafts, running, right=False) for _ in range(1000)]
    assert {*chosen} == {1, 4}
    assert 0.8 * chosen.count(4) < 2 + 0.005 * len(chosen)
    assert chosen[:2] == [4, 4]


def test_a_sequence_drafts_more_once_its_drafts_were_right():
    drafts, running = Drafts(controller(COSTS), None, is_forced=False), promising()
    assert [drafted(drafts, running, right=True) for _ in range(4)] == [4, 16, 16, 16]
    wrong = [drafted(drafts, running, right=False) for _ in range(500)]
    assert sum(dict(COSTS).get(tokens, 1) - 1 for tokens in wrong) < 6 + 2 + 5


def test_auto_speculates_on_a_quotation_and_changes_no_token():
    metrics = ModelMetrics("")
    one = sequence(1, prompt(20), SamplingParams(temperature=0.0, logit_bias={5: 90.0}), 100)
    assert run(model(), one, metrics=metrics, speculation="auto")[1] == [5] * 100
    assert metrics.batch_size.count <= 102
