"""Records of requests -> a summary. Pure.

Rule 1: all times are in seconds of one clock (time.perf_counter).
Rule 2: the steady part of a load lasts from its first request until fewer requests run than there are clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import median


@dataclass(frozen=True, slots=True)
class Record:
    """One request. arrivals: when each piece of text came. tokens: how many were generated. connected: seconds."""

    sent: float
    ended: float
    arrivals: tuple[float, ...]
    tokens: int
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    connected: float = 0.0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds until the first text. Only for a request that gave any."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one text and the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Summary:
    """A load in figures: rates in tokens/s, times in seconds. slow_connects: how many took over half a second."""

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
        """By name, for a table or JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of them lie, between neighbours by proportion; nan for none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(records: Sequence[Record]) -> Summary:
    """The figures of a load. Requests that failed count as errors and in nothing else; those without any text, as when
    a random model says parts of characters only, count for nothing but requests.
    """
    good = [record for record in records if record.error is None and record.arrivals]
    if not good:
        raise ValueError(f"All {len(records)} requests failed; the first: {records[0].error or 'no text came'}")
    begin, end = min(r.sent for r in good), max(r.ended for r in good)
    steady_end = min(r.ended for r in good if r.ended >= max(r.sent for r in good))
    steady_tokens = sum(r.tokens * sum(at <= steady_end for at in r.arrivals) / len(r.arrivals) for r in good)
    ttfts = [record.ttft for record in good]
    gaps = [gap for record in good for gap in record.gaps]
    tokens = sum(record.tokens for record in good)
    return Summary(
        requests=len(records),
        errors=sum(record.error is not None for record in records),
        tokens=tokens,
        seconds=end - begin,
        tokens_per_second=steady_tokens / (steady_end - begin),
        overall_tokens_per_second=tokens / (end - begin),
        ttft_p50=percentile(ttfts, 50),
        ttft_p95=percentile(ttfts, 95),
        gap_p50=percentile(gaps, 50),
        gap_p99=percentile(gaps, 99),
        prompt_tokens=sum(record.prompt_tokens for record in good),
        cached_tokens=sum(record.cached_tokens for record in good),
        slow_connects=sum(record.connected > 0.5 for record in records),
    )


def decode_rate(records: Sequence[Record], rows: int) -> float:
    """Tokens/s of the steps in which all `rows` advanced, by the median step; nan if there were no two in a row."""
    advanced = Counter(at for record in records for at in record.arrivals)
    steps = sorted(advanced)
    times = [b - a for a, b in pairwise(steps) if advanced[a] == advanced[b] == rows]
    return rows / median(times) if times else float("nan")
