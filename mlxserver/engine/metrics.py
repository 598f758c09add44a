"""Counters of each model, and the load of each engine. Counters only grow, for as long as the model has its key.

Rule 1: each figure has one writer thread at a time, so that none needs a lock; a reader may see a value a moment old.
Rule 2: counting costs less than a microsecond; the reader pays for sums and percentiles.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from mlxserver.engine.events import Usage

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Histogram:
    """Histogram with cumulative buckets; `bounds` are their upper bounds, ascending."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self._counts)

    @property
    def cumulative(self) -> list[int]:
        """For each bound, and at last for none, the number of values that were not above it."""
        return list(accumulate(self._counts))


def _seconds() -> Histogram:
    return Histogram(SECONDS)


@dataclass(slots=True)
class ModelMetrics:
    """All counters of one model.

    Written by the engine thread: batch_size, inter_token, generated_tokens (those of running requests included),
    drafted_tokens, accepted_tokens and faults; by the event loop: the rest. `requests` are keyed
    by outcome ("stop", "length", "tool_calls", "cancelled", or an error's name) and the dialect of the client ("" where
    there is none), `ttft` by the dialect, `loads` by "loaded", "failed",
    "aborted" and "refused", `unloads` by cause ("drain", "abort", "reject", "evict", "idle"), `faults` by what failed
    ("request", "step", "out_of_memory"). Times in seconds.
    """

    key: str
    ttft: dict[str, Histogram] = field(default_factory=lambda: defaultdict(_seconds))
    inter_token: Histogram = field(default_factory=_seconds)
    queue: Histogram = field(default_factory=_seconds)
    load: Histogram = field(default_factory=_seconds)
    batch_size: Histogram = field(default_factory=lambda: Histogram(BATCH_SIZES))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    unloads: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def note(self, outcome: str, usage: Usage | None = None, dialect: str = "") -> None:
        """Count a request that has ended."""
        self.requests[outcome, dialect] += 1
        if usage is None:
            return
        self.queue.observe(usage.timings.queue)
        self.ttft[dialect].observe(usage.timings.queue + usage.timings.prompt)
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.reasoning_tokens += usage.reasoning_tokens


@dataclass(slots=True, weakref_slot=True, eq=False)
class EngineLoad:
    """Load of one engine: all that other threads may read of its batch. Written by the engine thread alone.

    is_busy: sequences wait or run. num_running: requests that hold at least one slot, prefilling or decoding.
    step_seconds: duration of a decode step while sequences decode, 0 otherwise.
    """

    is_busy: bool = False
    num_running: int = 0
    step_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a model has in a tier of the prefix cache. hits: prompts that found a prefix there."""

    tier: str
    model: str
    entries: int
    bytes: int
    hits: int


@dataclass(frozen=True, slots=True)
class RankReport:
    """A rank. error: why it is lost. memory_bytes: as last reported. silent_seconds: since its last message."""

    rank: int
    address: str
    error: str | None
    memory_bytes: int
    silent_seconds: float
