"""Figures of requests: arrival times in; latencies, rates and percentiles out. Pure.

Rule 1: times are seconds of one monotonic clock, latencies are seconds, rates are per second.
Rule 2: token counts are the server's usage. A request without usage has no rates; nothing is guessed from the text.
Rule 3: a percentile is interpolated linearly between the closest ranks: p of n sorted values is the value at rank
        p / 100 * (n - 1), counted from 0.
Rule 4: a figure that can't be known (no tokens, a single token, no time between) is None, never 0 or infinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from mlxserver.client.events import Content, Event, Finished, Usage


@dataclass(frozen=True, slots=True)
class Timing:
    """Timing of one request that was answered whole.

    start: when it was sent. end: when its stream ended. arrivals: of each delta (reasoning, content or tool call).
    first_content: arrival of the first delta of content, None if there was none.
    """

    start: float
    end: float
    arrivals: tuple[float, ...] = ()
    first_content: float | None = None
    usage: Usage | None = None

    @property
    def latency(self) -> float:
        """Seconds from sending to the end."""
        return self.end - self.start

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token of any kind."""
        return self.arrivals[0] - self.start if self.arrivals else None

    @property
    def time_to_content(self) -> float | None:
        """Seconds to the first token of the content, reasoning included."""
        return None if self.first_content is None else self.first_content - self.start

    @property
    def gaps(self) -> tuple[float, ...]:
        """Seconds between successive arrivals: inter-token latencies where the server sends each token by itself."""
        return tuple(later - earlier for earlier, later in pairwise(self.arrivals))

    @property
    def tokens(self) -> int | None:
        """Generated tokens, reasoning included."""
        return None if self.usage is None else self.usage.completion_tokens

    @property
    def time_per_token(self) -> float | None:
        """Seconds from the first arrival to the last over the tokens after the first: right for chunks of any size."""
        if not self.arrivals or self.tokens is None or self.tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding: the inverse of time_per_token, so without the time to the first token."""
        return 1 / self.time_per_token if self.time_per_token else None


@dataclass(frozen=True, slots=True)
class Distribution:
    """Distribution of values of one kind."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of requests that ran in one window, from the first start to the last end.

    gaps are pooled over all requests; every other distribution has one value per request. tokens_per_second is per
    request, total_tokens_per_second of all together over the window.
    """

    requests: int
    tokens: int | None
    seconds: float
    ttft: Distribution | None
    time_to_content: Distribution | None
    gaps: Distribution | None
    time_per_token: Distribution | None
    latency: Distribution | None
    tokens_per_second: Distribution | None
    total_tokens_per_second: float | None
    requests_per_second: float | None


def timing(start: float, events: Sequence[Event]) -> Timing:
    """Timing of a whole stream. events: in order, Finished as the last. Raises ValueError without Finished."""
    if not events or not isinstance(events[-1], Finished):
        raise ValueError(f"events: {len(events)} without an end; expected Finished as the last.")
    *deltas, finished = events
    return Timing(
        start=start,
        end=finished.at,
        arrivals=tuple(delta.at for delta in deltas),
        first_content=next((delta.at for delta in deltas if isinstance(delta, Content)), None),
        usage=events[-1].usage,
    )


def summarise(timings: Sequence[Timing]) -> Summary:
    """Summary of requests that ran together. tokens is None if one of them has no usage."""
    seconds = max((t.end for t in timings), default=0.0) - min((t.start for t in timings), default=0.0)
    counts = [t.tokens for t in timings if t.tokens is not None]
    tokens = sum(counts) if len(counts) == len(timings) else None
    return Summary(
        requests=len(timings),
        tokens=tokens,
        seconds=seconds,
        ttft=distribution(t.ttft for t in timings),
        time_to_content=distribution(t.time_to_content for t in timings),
        gaps=distribution(gap for t in timings for gap in t.gaps),
        time_per_token=distribution(t.time_per_token for t in timings),
        latency=distribution(t.latency for t in timings),
        tokens_per_second=distribution(t.tokens_per_second for t in timings),
        total_tokens_per_second=tokens / seconds if tokens is not None and seconds > 0 else None,
        requests_per_second=len(timings) / seconds if seconds > 0 else None,
    )


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Distribution of the values that are not None; None if all are."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    p50, p95, p99 = (percentile(known, p) for p in (50, 95, 99))
    return Distribution(len(known), fmean(known), p50, p95, p99, known[-1])


def percentile(ordered: Sequence[float], p: float) -> float:
    """The p-th percentile (0 to 100) of sorted values, at least one. See rule 3."""
    rank = p / 100 * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def milliseconds(seconds: float | None) -> float | None:
    """Seconds as milliseconds; None stays None."""
    return None if seconds is None else seconds * 1000
