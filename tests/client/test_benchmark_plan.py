"""Plan of a benchmark: prompts, arrivals and service objectives."""

from hypothesis import given
from hypothesis import strategies as st

from mlxserver.client.bench.interference import Interference
from mlxserver.client.bench.plan import Level, Plan, Slo, parse_slo, user
from mlxserver.client.errors import SettingInvalid
from mlxserver.client.events import Usage
from mlxserver.client.stats import Timing


def test_a_plan_is_the_same_for_the_same_seed():
    plan = Plan(("a", "b"), tuple(map(user, "ABC")), concurrency=(1, 4), requests=7, seed=5)
    assert plan.questions() == Plan(("c",), plan.prompts, requests=7, seed=5).questions()
    assert plan.levels == tuple(Level(model, count) for model in ("a", "b") for count in (1, 4))
    arrivals = Plan(("a",), plan.prompts, rates=(50.0,), requests=2000).arrivals(50.0)
    assert arrivals == sorted(arrivals)
    assert 35 < arrivals[-1] < 45


def test_objectives_are_met_or_not():
    timing = Timing(0.0, 1.0, (0.4, 0.5, 0.6), 0.4, Usage(5, 3))
    assert parse_slo("ttft=500, itl=100.1") == Slo(ttft=0.5, itl=0.1001)
    assert parse_slo("ttft=500,itl=101,e2e=1000").is_met(timing)
    for broken in ("ttft=399", "itl=99", "e2e=999"):
        assert not parse_slo(broken).is_met(timing)
    assert not Slo(itl=1.0).is_met(Timing(0.0, 1.0, (0.4,), 0.4, Usage(5, 1)))


@given(st.text())
def test_any_text_as_objectives_is_parsed_or_refused(text):
    try:
        assert isinstance(parse_slo(text), Slo)
    except SettingInvalid as error:
        assert "expected milliseconds" in str(error)


def test_long_prompts_share_no_prefix():
    interference = Interference(None, Plan(("a",), (user("x"),), concurrency=(1,)), "a", "b")
    one, other = (interference.long_prompt()[0]["content"].split() for _ in range(2))
    assert one[:3] != other[:3]
