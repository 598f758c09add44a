"""Figures of made-up timings, computed by hand."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.client.events import Content, Finished, Reasoning, ToolCall, Usage
from mlxserver.client.stats import Distribution, Timing, distribution, percentile, summarise, timing


def test_a_timing_is_taken_from_the_events_of_a_stream():
    events = [Reasoning("a", 11.0), Content("b", 12.0), ToolCall(0, at=13.0), Finished("stop", Usage(5, 4), 14.0)]
    assert timing(10.0, events) == Timing(10.0, 14.0, (11.0, 12.0, 13.0), 12.0, Usage(5, 4))


@pytest.mark.parametrize("events", [[], [Content("b", 12.0)]])
def test_a_stream_that_did_not_end_has_no_timing(events):
    with pytest.raises(ValueError, match="expected Finished"):
        timing(10.0, events)


def test_the_figures_of_one_request_are_the_differences_of_its_times():
    one = Timing(start=10.0, end=13.5, arrivals=(11.0, 11.5, 13.0), first_content=11.5, usage=Usage(5, 5))
    assert (one.ttft, one.time_to_content, one.latency) == (1.0, 1.5, 3.5)
    assert one.gaps == (0.5, 1.5)
    assert (one.time_per_token, one.tokens_per_second) == (0.5, 2.0)


@pytest.mark.parametrize(
    "one",
    [
        Timing(0.0, 1.0),
        Timing(0.0, 1.0, (0.5,), None, Usage(5, 1)),
        Timing(0.0, 1.0, (0.5, 0.75)),
        Timing(0.0, 1.0, (0.5, 0.5), None, Usage(5, 2)),
    ],
    ids=["no tokens", "one token", "no usage", "no time between"],
)
def test_an_unknown_rate_is_none(one):
    assert one.tokens_per_second is None
    assert one.time_to_content is None


def test_a_summary_pools_the_gaps_and_counts_tokens_over_the_window():
    first = Timing(0.0, 3.0, (1.0, 2.0, 3.0), 1.0, Usage(5, 3))
    second = Timing(1.0, 4.0, (3.0, 3.5), 3.0, Usage(5, 2))
    summary = summarise([first, second])
    assert (summary.requests, summary.tokens, summary.seconds) == (2, 5, 4.0)
    assert (summary.total_tokens_per_second, summary.requests_per_second) == (1.25, 0.5)
    assert summary.gaps == Distribution(3, pytest.approx(2.5 / 3), 1.0, 1.0, 1.0, 1.0)
    assert summary.ttft == Distribution(2, 1.5, 1.5, pytest.approx(1.95), pytest.approx(1.99), 2.0)
    assert summary.tokens_per_second.mean == 1.5


def test_a_request_without_usage_leaves_the_totals_unknown():
    summary = summarise([Timing(0.0, 1.0, (0.5,), 0.5, Usage(5, 1)), Timing(0.0, 1.0, (0.5,))])
    assert summary.tokens is None
    assert summary.total_tokens_per_second is None
    assert summary.ttft.count == 2


def test_the_summary_of_no_requests_has_no_figures():
    summary = summarise([])
    assert (summary.requests, summary.tokens, summary.seconds) == (0, 0, 0.0)
    assert (summary.ttft, summary.requests_per_second, summary.total_tokens_per_second) == (None, None, None)


def test_unknown_values_are_left_out_of_a_distribution():
    assert distribution([None, 2.0, None]) == Distribution(1, 2.0, 2.0, 2.0, 2.0, 2.0)
    assert distribution([None]) is None


@pytest.mark.parametrize(("p", "expected"), [(0, 10.0), (50, 25.0), (95, 38.5), (100, 40.0)])
def test_a_percentile_lies_between_the_closest_ranks(p, expected):
    assert percentile([10.0, 20.0, 30.0, 40.0], p) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_percentiles_agree_with_the_standard_librarys_inclusive_quantiles(values):
    ordered = sorted(values)
    cuts = statistics.quantiles(ordered, n=100, method="inclusive")
    for p in (50, 95, 99):
        assert percentile(ordered, p) == pytest.approx(cuts[p - 1])
