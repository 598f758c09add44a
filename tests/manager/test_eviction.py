"""Decisions on evictions, from plain figures."""

import math
from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st

from mlxserver.engine.errors import Projection
from mlxserver.manager.eviction import Granted, MemoryRequest, Postponed, Refused, Resident, Rules, decide

RULES = Rules(budget=100, min_residency=10, max_wait=30)


def idle(holder, bytes=40, **fields):
    return Resident(holder, bytes, **fields)


def busy(holder, bytes=40, **fields):
    return Resident(holder, bytes, is_busy=True, **fields)


def test_a_model_that_fits_evicts_no_other():
    assert decide(MemoryRequest(60), [idle("a")], RULES, now=0) == Granted()


def test_the_least_recently_used_idle_model_is_evicted():
    residents = [idle("new", last_used=5), idle("old", last_used=1)]
    assert decide(MemoryRequest(50), residents, RULES, now=9) == Granted(("old",))


def test_no_model_is_evicted_in_vain():
    residents = [idle("small", 10, last_used=1), idle("large", 80, last_used=2)]
    assert decide(MemoryRequest(70), residents, RULES, now=9) == Granted(("large",))


def test_a_load_without_a_request_evicts_no_model_in_use():
    decision = decide(MemoryRequest(50), [idle("a", 20), busy("b", 50), busy("c", 30, is_pinned=True)], RULES, now=99)
    assert decision == Refused(Projection(needed=50, free=0, evictable=20, pinned=30, busy=50, budget=100))


def test_a_request_waits_until_the_model_in_use_was_there_for_its_time():
    residents = [busy("a", 80, resident_since=3)]
    assert decide(MemoryRequest(50, waiting_since=4), residents, RULES, now=5) == Postponed(until=13)
    assert decide(MemoryRequest(50, waiting_since=4), residents, RULES, now=13) == Granted(("a",))


def test_a_request_waits_no_longer_than_the_longest_wait():
    rules = replace(RULES, min_residency=1000)
    residents = [busy("a", 80, resident_since=3)]
    assert decide(MemoryRequest(50, waiting_since=4), residents, rules, now=5) == Postponed(until=34)
    assert decide(MemoryRequest(50, waiting_since=4), residents, rules, now=34) == Granted(("a",))


def test_an_idle_model_is_evicted_for_a_request_whatever_its_residency():
    assert decide(MemoryRequest(50, waiting_since=4), [idle("a", 80, resident_since=4)], RULES, now=4) == Granted(
        ("a",)
    )


def test_a_request_waits_for_a_model_that_is_being_loaded():
    residents = [busy("a", 80, is_evictable=False)]
    assert decide(MemoryRequest(50, waiting_since=4), residents, RULES, now=500) == Postponed(until=math.inf)


def test_a_pinned_model_is_never_evicted():
    residents = [idle("a", 80, is_pinned=True)]
    assert isinstance(decide(MemoryRequest(50, waiting_since=0), residents, RULES, now=500), Refused)


def test_more_than_the_budget_is_refused():
    assert isinstance(decide(MemoryRequest(101, waiting_since=0), [], RULES, now=0), Refused)


some_residents = st.lists(
    st.builds(
        Resident,
        holder=st.uuids(),
        bytes=st.integers(0, 60),
        is_pinned=st.booleans(),
        is_busy=st.booleans(),
        is_evictable=st.booleans(),
        last_used=st.integers(0, 50),
        resident_since=st.integers(0, 50),
    ),
    max_size=6,
    unique_by=lambda r: r.holder,
)


@given(st.integers(0, 130), st.none() | st.integers(0, 50), some_residents)
def test_every_decision_keeps_the_rules(bytes, waiting_since, residents):
    now = 50
    known = {r.holder: r for r in residents}
    free = RULES.budget - sum(r.bytes for r in residents)
    idle = [r for r in residents if r.is_evictable and not r.is_busy and not r.is_pinned]
    candidates = [r for r in residents if not r.is_pinned and (r.is_busy or r.is_evictable)]
    match decide(MemoryRequest(bytes, waiting_since), residents, RULES, now):
        case Granted(victims):
            leaving = [known[victim] for victim in victims]
            assert free + sum(r.bytes for r in leaving) >= bytes
            assert all(r.is_evictable and not r.is_pinned for r in leaving)
            for spare in leaving:
                assert free + sum(r.bytes for r in leaving) - spare.bytes < bytes
            for r in leaving:
                waited = waiting_since is not None and now - waiting_since >= RULES.max_wait
                assert not r.is_busy or waited or now - r.resident_since >= RULES.min_residency
        case Postponed(until):
            assert waiting_since is not None
            assert until > now
            assert free + sum(r.bytes for r in candidates) >= bytes
        case Refused(projection):
            assert projection.needed == bytes
            able = idle if waiting_since is None else candidates
            assert free + sum(r.bytes for r in able) < bytes
            assert projection.budget == RULES.budget


@example(0, [idle("a", 46, is_pinned=True), idle("b", 55, is_pinned=True)])
@given(st.integers(0, 100), some_residents)
def test_a_request_for_a_model_that_can_fit_is_granted_in_the_end(bytes, residents):
    """Once nothing is being loaded and the longest wait is over, only pinned models stand in the way."""
    settled = [replace(r, is_evictable=True) for r in residents]
    pinned = sum(r.bytes for r in settled if r.is_pinned)
    decision = decide(MemoryRequest(bytes, waiting_since=0), settled, RULES, now=RULES.max_wait)
    assert isinstance(decision, Granted) == (bytes <= RULES.budget - pinned)
