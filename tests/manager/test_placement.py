"""Who leaves for whom: decisions from plain figures."""

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


def test_what_fits_makes_nobody_leave():
    assert decide(MemoryRequest(60), [idle("a")], RULES, now=0) == Granted()


def test_the_least_recently_used_idle_model_leaves():
    residents = [idle("new", last_used=5), idle("old", last_used=1)]
    assert decide(MemoryRequest(50), residents, RULES, now=9) == Granted(("old",))


def test_nobody_leaves_who_would_not_have_had_to():
    residents = [idle("small", 10, last_used=1), idle("large", 80, last_used=2)]
    assert decide(MemoryRequest(70), residents, RULES, now=9) == Granted(("large",))


def test_a_load_that_nobody_waits_for_evicts_no_model_in_use():
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


def test_an_idle_model_leaves_at_once_for_a_request_however_short_it_was_there():
    assert decide(MemoryRequest(50, waiting_since=4), [idle("a", 80, resident_since=4)], RULES, now=4) == Granted(
        ("a",)
    )


def test_a_model_that_is_being_loaded_is_waited_for():
    residents = [busy("a", 80, is_movable=False)]
    assert decide(MemoryRequest(50, waiting_since=4), residents, RULES, now=500) == Postponed(until=math.inf)


def test_a_pinned_model_never_leaves():
    residents = [idle("a", 80, is_pinned=True)]
    assert isinstance(decide(MemoryRequest(50, waiting_since=0), residents, RULES, now=500), Refused)


def test_more_than_the_budget_is_refused():
    assert isinstance(decide(MemoryRequest(101, waiting_since=0), [], RULES, now=0), Refused)


occupants_ = st.lists(
    st.builds(
        Resident,
        holder=st.uuids(),
        bytes=st.integers(0, 60),
        is_pinned=st.booleans(),
        is_busy=st.booleans(),
        is_movable=st.booleans(),
        last_used=st.integers(0, 50),
        resident_since=st.integers(0, 50),
    ),
    max_size=6,
    unique_by=lambda o: o.holder,
)


@given(st.integers(0, 130), st.none() | st.integers(0, 50), occupants_)
def test_every_decision_keeps_the_rules(bytes, waiting_since, residents):
    now = 50
    known = {o.holder: o for o in residents}
    free = RULES.budget - sum(o.bytes for o in residents)
    idle = [o for o in residents if o.is_movable and not o.is_busy and not o.is_pinned]
    movable = [o for o in residents if not o.is_pinned and (o.is_busy or o.is_movable)]
    match decide(MemoryRequest(bytes, waiting_since), residents, RULES, now):
        case Granted(victims):
            leaving = [known[victim] for victim in victims]
            assert free + sum(o.bytes for o in leaving) >= bytes
            assert all(o.is_movable and not o.is_pinned for o in leaving)
            for needless in leaving:
                assert free + sum(o.bytes for o in leaving) - needless.bytes < bytes
            for o in leaving:
                waited = waiting_since is not None and now - waiting_since >= RULES.max_wait
                assert not o.is_busy or waited or now - o.resident_since >= RULES.min_residency
        case Postponed(until):
            assert waiting_since is not None
            assert until > now
            assert free + sum(o.bytes for o in movable) >= bytes
        case Refused(projection):
            assert projection.needed == bytes
            able = idle if waiting_since is None else movable
            assert free + sum(o.bytes for o in able) < bytes
            assert projection.budget == RULES.budget


@example(0, [idle("a", 46, is_pinned=True), idle("b", 55, is_pinned=True)])
@given(st.integers(0, 100), occupants_)
def test_a_request_for_what_can_fit_gets_its_turn_in_the_end(bytes, residents):
    """Once nothing is being loaded and the longest wait is over, only pinned models stand in the way."""
    settled = [replace(o, is_movable=True) for o in residents]
    pinned = sum(o.bytes for o in settled if o.is_pinned)
    decision = decide(MemoryRequest(bytes, waiting_since=0), settled, RULES, now=RULES.max_wait)
    assert isinstance(decision, Granted) == (bytes <= RULES.budget - pinned)
