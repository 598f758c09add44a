"""Claims of several models to one pool: never more than the limit is held, and the oldest sequence gets on."""

import math
import threading

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlxserver.engine.kv_claims import Claim, Outlook, Share, Verdict, grow, must_yield, start
from mlxserver.engine.kv_pool import KVPool, Reserved
from tests.support.prefixes import Entries

LIMIT, FLOOR = 100, 4


def growth(extra, outlook=Outlook.LATER, since=0.0):
    return Claim(extra, since, is_growth=True, outlook=outlook)


def prompt(extra, outlook=Outlook.LATER, since=0.0):
    return Claim(extra, since, is_growth=False, outlook=outlook)


def test_a_prompt_waits_while_another_model_s_sequences_wait_to_grow():
    assert start(Share(), [Share(20, 1, 1.0, growth(10))], prompt(5), space=8) is Verdict.WAITING
    assert start(Share(), [Share(20, 1, 1.0)], prompt(5), space=8) is Verdict.GRANTED


def test_a_prompt_waits_behind_an_older_one_that_the_pool_could_hold():
    older = Share(claim=prompt(30, since=1.0))
    running = Share(25, 1, 0.5)
    assert start(Share(), [older, running], prompt(5, since=2.0), space=8) is Verdict.WAITING
    assert start(Share(), [older], prompt(5, since=2.0), space=8) is Verdict.GRANTED  # it waits for models to leave


def test_idle_models_leave_before_a_sequence_is_preempted():
    own, claim = Share(20, 2, 2.0), growth(10, Outlook.UNKNOWN)
    assert grow(own, [], claim, space=0) is Verdict.WAITING
    assert grow(own, [], growth(10, Outlook.COMING), space=0) is Verdict.WAITING
    assert grow(own, [], growth(10, Outlook.LATER), space=0) is Verdict.PREEMPT


def test_the_youngest_sequence_of_all_models_is_preempted():
    older, younger = Share(20, 1, 1.0, growth(10)), Share(20, 1, 2.0)
    assert grow(older, [younger], growth(10), space=0) is Verdict.WAITING
    assert must_yield(younger, [older], space=0)
    assert not must_yield(older, [younger], space=0)
    assert grow(younger, [older], growth(10), space=0) is Verdict.PREEMPT


def test_a_last_sequence_goes_on_when_nothing_can_leave_any_more():
    assert grow(Share(20, 1, 1.0), [], growth(10, Outlook.NEVER), space=0) is Verdict.GRANTED


def test_a_last_sequence_gives_its_memory_back_to_models_that_have_to_end_before_they_leave():
    waiting = Share(claim=prompt(10))
    assert grow(Share(20, 1, 1.0), [waiting], growth(10), space=0) is Verdict.PREEMPT
    assert grow(Share(20, 1, 1.0), [], growth(10), space=0) is Verdict.WAITING


def test_prefixes_give_way_to_sequences():
    entries = Entries()
    pool = KVPool(entries)
    pool.publish(LIMIT, 40, {})
    with pool.storing(50) as fits:
        assert fits
        entries.total_bytes += 50
    account = pool.open("m", FLOOR)
    assert account.start(FLOOR + 30, 1, 0.0, 0.0)
    assert (account.live, pool.prefix_bytes) == (FLOOR + 30, 30)
    with pool.storing(31) as fits:
        assert not fits
    with pool.storing(20) as fits:
        assert fits
        assert pool.prefix_bytes == 30
        entries.total_bytes += 20
    assert pool.prefix_bytes == 30


def test_what_one_model_could_have_alone_leaves_out_pinned_models():
    pool = KVPool()
    account = pool.open("m", FLOOR)
    assert account.most_alone is None
    pool.publish(LIMIT, 70, {"m": Reserved(30), "idle": Reserved(20), "pinned": Reserved(20, is_pinned=True)})
    assert account.most_alone == LIMIT - 20 - 30 + FLOOR


def test_a_waiting_thread_is_notified_of_memory():
    pool = KVPool()
    pool.publish(LIMIT, 0, {})
    first, second = pool.open("a", 0), pool.open("b", 0)
    assert first.start(80, 1, 1.0, 1.0)
    assert not second.start(30, 1, 2.0, 2.0)
    claimed = []

    def claim():
        while not second.start(30, 1, 2.0, 3.0):
            second.wait()
        claimed.append(True)

    thread = threading.Thread(target=claim)
    thread.start()
    first.give_back(0, 0, -math.inf)
    thread.join()
    assert claimed


class Model:
    """A model as its scheduler drives it: sequences that start, grow by one each step, end, and are preempted."""

    def __init__(self, pool, key, clock):
        self.account = pool.open(key, FLOOR)
        self.clock = clock
        self.waiting = []  # [arrived, bytes, bytes at the end], the first comes next
        self.running = []  # [started, arrived, bytes, bytes at the end]
        self.is_held_up = False

    @property
    def bytes(self):
        return sum(sequence[2] for sequence in self.running)

    @property
    def youngest(self):
        return max((sequence[0] for sequence in self.running), default=-math.inf)

    def step(self):
        """Decode and prefill once. The bytes that its sequences have grown by, and those that it has started."""
        self.is_held_up = False
        while self.running:
            verdict = self.account.grow(self.bytes + len(self.running), len(self.running), self.youngest)
            if verdict is not Verdict.PREEMPT:
                break
            self.preempt()
        else:
            verdict = Verdict.WAITING
        if self.running and verdict is Verdict.WAITING:
            self.is_held_up = True
            return
        for sequence in self.running:
            sequence[2] += 1
        self.running = [sequence for sequence in self.running if sequence[2] < sequence[3]]
        self.account.give_back(self.bytes, len(self.running), self.youngest)
        while self.waiting:
            arrived, bytes, end = self.waiting[0]
            now = next(self.clock)
            if not self.account.start(self.bytes + bytes, len(self.running) + 1, arrived, now):
                return
            self.running.append([now, *self.waiting.pop(0)])
        self.account.withdraw()

    def preempt(self):
        youngest = max(self.running)
        self.running.remove(youngest)
        self.waiting.insert(0, youngest[1:])
        self.account.give_back(self.bytes, len(self.running), self.youngest)


class Pool(RuleBasedStateMachine):
    """Three models with prompts of any size that the pool could hold alone, and a manager that may have idle models."""

    def __init__(self):
        super().__init__()
        self.clock = iter(range(10**9))
        self.entries = Entries()
        self.pool = KVPool(self.entries)
        self.storing = None
        self.idle = 0
        self.fixed = 0
        self.publish()
        self.models = [Model(self.pool, key, self.clock) for key in "abc"]
        self.fixed = 3 * FLOOR
        self.publish()

    def publish(self):
        reserved = {key: Reserved(FLOOR) for key in "abc"}
        self.pool.publish(LIMIT, self.fixed + self.idle, reserved)

    @rule(which=st.integers(0, 2), bytes=st.integers(1, LIMIT - 3 * FLOOR), growth=st.integers(1, 30))
    def arrive(self, which, bytes, growth):
        end = min(bytes + growth, LIMIT - 3 * FLOOR)
        self.models[which].waiting.append([next(self.clock), min(bytes, end - 1) or 1, end])

    @rule(which=st.integers(0, 2))
    def step(self, which):
        self.models[which].step()

    @precondition(lambda self: self.models[0].running or self.models[1].running or self.models[2].running)
    @rule(which=st.integers(0, 2))
    def hang_up(self, which):
        model = self.models[which]
        if model.running:
            model.running.pop()
            model.account.give_back(model.bytes, len(model.running), model.youngest)

    @rule(bytes=st.integers(1, 40))
    def store_prefix(self, bytes):
        with self.pool.storing(bytes) as fits:
            self.entries.total_bytes += bytes if fits else 0

    @rule(bytes=st.integers(1, 40))
    def begin_to_store(self, bytes):
        self.finish_storing()
        self.storing = self.pool.storing(bytes)
        self.stored = bytes if self.storing.__enter__() else 0

    @rule()
    def finish_storing(self):
        """What was begun, while other models claimed memory."""
        if self.storing:
            self.entries.total_bytes += self.stored
            self.storing.__exit__(None, None, None)
            self.storing = None

    @rule(bytes=st.integers(1, 50))
    def load_an_idle_model(self, bytes):
        room = LIMIT - self.fixed - self.pool.total_over - bytes
        if not self.idle and room >= 0 and self.pool.stores_within(room):
            self.idle = bytes
            self.publish()

    @rule()
    def answer_the_claims(self):
        """As the manager does: an idle model leaves for a claim that it is enough for."""
        for account, claim in self.pool.waiting:
            missing = claim.extra - (LIMIT - self.fixed - self.idle - self.pool.total_over)
            if self.idle and missing <= self.idle:
                self.pool.set_outlook(account, claim, Outlook.COMING)
                self.idle = 0
                self.publish()
            else:
                self.pool.set_outlook(account, claim, Outlook.LATER)

    @invariant()
    def no_more_is_held_than_the_limit(self):
        over = sum(max(0, model.bytes - FLOOR) for model in self.models)
        assert over <= self.pool.total_over
        assert self.fixed + self.idle + self.pool.total_over + self.pool.prefix_bytes <= LIMIT

    def teardown(self):
        """Whatever happened, every sequence ends, and the oldest one that runs is never preempted."""
        self.finish_storing()
        self.idle = 0
        self.publish()
        for _ in range(3000):
            if not any(model.running or model.waiting for model in self.models):
                return
            for model in self.models:
                oldest = min((sequence for each in self.models for sequence in each.running), default=None)
                model.step()
                assert oldest is None or oldest[2] >= oldest[3] or any(oldest in each.running for each in self.models)
                self.answer_the_claims()
                self.no_more_is_held_than_the_limit()
        raise AssertionError([(model.running, model.waiting, model.account.share) for model in self.models])


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase
