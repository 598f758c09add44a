"""Summary of a load: what the benchmarks add to the client's figures (mlxserver/client/stats.py). Pure.

Rule 1: times are seconds of time.perf_counter(). A request starts when it is written: connecting is in no latency.
Rule 2: the steady part of a load lasts from its first request until fewer requests run than there are clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import median

from mlxserver.client import stats
from mlxserver.client.bench.load import Sample
from mlxserver.client.events import Usage
from mlxserver.client.stats import Timing

SLOW_CONNECT = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Summary:
    """A load in figures: rates in tokens/s, times in seconds. slow_connects: connections over SLOW_CONNECT."""

    requests: int
    errors: int
    tokens: int
    seconds: float
    tokens_per_second: float
    overall_tokens_per_second: float
    ttft_p50: float
    ttft_p95: float
    gap_p50: float
    gap_p99: float
    prompt_tokens: int
    cached_tokens: int
    slow_connects: int

    def figures(self) -> dict[str, float]:
        """The figures by name, for a table or JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def percentile(values: Iterable[float | None], percent: float) -> float:
    """The percentile of the known values, interpolated linearly between the closest ranks; NaN if none is known."""
    known = sorted(value for value in values if value is not None)
    return stats.percentile(known, percent) if known else float("nan")


def usage(timing: Timing) -> Usage:
    """Token counts of a request: the server's, or else one token per arrival."""
    return timing.usage or Usage(completion_tokens=len(timing.arrivals))


def summarise(samples: Sequence[Sample]) -> Summary:
    """The figures of a load. Failed requests count as errors and in nothing else; those without any text, as when
    a random model generates only parts of characters, count as requests and in nothing else.

    Raises ValueError when no request gave text.
    """
    good = [sample.timing for sample in samples if sample.timing and sample.timing.arrivals]
    if not good:
        raise ValueError(f"All {len(samples)} requests failed; the first: {samples[0].error or 'no text came'}")
    begin, end = min(t.start for t in good), max(t.end for t in good)
    counts = [usage(timing) for timing in good]
    ttfts = [timing.ttft for timing in good]
    gaps = [gap for timing in good for gap in timing.gaps]
    tokens = sum(count.completion_tokens for count in counts)
    return Summary(
        requests=len(samples),
        errors=sum(sample.error is not None for sample in samples),
        tokens=tokens,
        seconds=end - begin,
        tokens_per_second=_steady_rate(good, begin),
        overall_tokens_per_second=tokens / (end - begin),
        ttft_p50=percentile(ttfts, 50),
        ttft_p95=percentile(ttfts, 95),
        gap_p50=percentile(gaps, 50),
        gap_p99=percentile(gaps, 99),
        prompt_tokens=sum(count.prompt_tokens for count in counts),
        cached_tokens=sum(count.cached_tokens for count in counts),
        slow_connects=sum(sample.connecting > SLOW_CONNECT for sample in samples),
    )


def _steady_rate(timings: Sequence[Timing], begin: float) -> float:
    """Tokens/s of the steady part (rule 2). An arrival counts as its request's mean tokens per arrival."""
    last_start = max(timing.start for timing in timings)
    end = min(timing.end for timing in timings if timing.end >= last_start)
    tokens = sum(
        usage(timing).completion_tokens * sum(at <= end for at in timing.arrivals) / len(timing.arrivals)
        for timing in timings
    )
    return tokens / (end - begin)


def decode_rate(timings: Sequence[Timing], sequences: int) -> float:
    """Tokens/s of the steps in which all `sequences` advanced, by the median step; NaN if no two follow each other."""
    advanced = Counter(at for timing in timings for at in timing.arrivals)
    steps = sorted(advanced)
    times = [b - a for a, b in pairwise(steps) if advanced[a] == advanced[b] == sequences]
    return sequences / median(times) if times else float("nan")
