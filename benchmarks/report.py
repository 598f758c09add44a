"""Table of a run's results. Pure, except for reading the file.

Rule 1: a ratio is ours / mlx_lm.server of one run, or a ratio of two of our own figures if the row's label is one.
Rule 2: a dash stands for what was not measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from benchmarks.servers import MLX_LM, OURS

RAW = "raw"
HEAD = ("measure", "ours", "mlx_lm.server", "ratio", "target", "met")
DASH = "-"


@dataclass(frozen=True, slots=True)
class Metric:
    """Figure of a load. factor: from its unit to the unit shown."""

    key: str
    label: str
    factor: float = 1.0


LOAD_METRICS = (
    Metric("tokens_per_second", "tokens/s"),
    Metric("ttft_p50", "TTFT p50, ms", 1000),
    Metric("ttft_p95", "TTFT p95, ms", 1000),
    Metric("gap_p50", "inter-token p50, ms", 1000),
    Metric("gap_p99", "inter-token p99, ms", 1000),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Limit that a ratio has to reach."""

    limit: float
    at_least: bool

    def is_met(self, ratio: float) -> bool:
        """Whether a ratio reaches the limit."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Line:
    """Row of the table. ours, theirs: None if not measured. ratio: of the first to the second."""

    label: str
    ours: float | None
    theirs: float | None
    ratio: float | None
    target: Target | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        met = DASH if self.ratio is None or self.target is None else "yes" if self.target.is_met(self.ratio) else "no"
        return (self.label, *map(_number, (self.ours, self.theirs, self.ratio)), str(self.target or DASH), met)


def _number(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


class Results:
    """Results of a run: figures by server (or "raw"), scenario and name."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._figures: Mapping[str, Any] = content["results"]
        self.is_gpu: bool = content["machine"]["gpu"]
        self.peak: int = content["settings"]["sizes"]["concurrency"][-1]
        self.raw_batch: int = content["settings"]["sizes"]["raw_batch"]

    def get(self, part: str, scenario: str, name: str, factor: float = 1.0) -> float | None:
        """A figure, or None if it was not measured."""
        value = self._figures.get(part, {}).get(scenario, {}).get(name)
        return None if value is None or isnan(value) else value * factor

    def scenarios(self) -> list[str]:
        """The loads of either server."""
        names = [*self._figures.get(OURS, {}), *self._figures.get(MLX_LM, {})]
        return [name for name in dict.fromkeys(names) if " c=" in name]

    def compare(self, label: str, scenario: str, metric: Metric, target: Target | None = None) -> Line:
        """Ours against mlx_lm.server's."""
        ours, theirs = (self.get(server, scenario, metric.key, metric.factor) for server in (OURS, MLX_LM))
        return Line(label, ours, theirs, divide(ours, theirs), target)

    def target(self, cpu: float, gpu: float, *, at_least: bool) -> Target:
        """The limit for this kind of device."""
        return Target(gpu if self.is_gpu else cpu, at_least)


def divide(first: float | None, second: float | None) -> float | None:
    """first / second; None if either is None, or the second is 0."""
    return None if first is None or not second else first / second


def promised_lines(results: Results) -> Iterator[Line]:
    """The ratios that have a target."""
    peak, (rate, ttft, _, _, gap) = results.peak, LOAD_METRICS
    at = f"sampled c={peak}"
    yield results.compare(f"{at}, tokens/s", at, rate, results.target(1.3, 2.5, at_least=True))
    yield results.compare(f"{at}, TTFT p50, ms", at, ttft, results.target(0.7, 0.4, at_least=False))
    yield results.compare(f"{at}, inter-token p99, ms", at, gap, results.target(0.7, 0.4, at_least=False))
    seeded = f"seeded c={peak}"
    yield results.compare(f"{seeded}, tokens/s", seeded, rate, results.target(4, 10, at_least=True))
    overall = Metric("overall_tokens_per_second", "")
    yield results.compare("two models, tokens/s", "two models", overall, results.target(3, 5, at_least=True))
    yield _own("second turn: TTFT second / first", results, "second turn", "second_over_first", (0.2, 0.3))
    http = results.get(OURS, at, rate.key)
    raw = results.get(RAW, "ours sampled", rate.key)
    yield Line(f"{at}: HTTP / raw engine", http, None, divide(http, raw), results.target(0.9, 0.9, at_least=True))
    greedy, distinct = (
        results.get(RAW, f"ours {kind}, full batch", "decode_tokens_per_second") for kind in ("greedy", "distinct")
    )
    label = f"raw engine, batch {results.raw_batch}: distinct / greedy"
    yield Line(label, distinct, None, divide(distinct, greedy), results.target(0.8, 0.7, at_least=True))
    yield _own("long prefill: inter-token p99 beside / alone", results, "long prefill", "beside_over_alone", (3, 2))
    for name, label in (("ttft", "TTFT p50"), ("gap", "inter-token p50")):
        label = f"short beside long: {label} beside / alone"
        yield _own(label, results, "short beside long", f"{name}_beside_over_alone", (1.3, 1.3))


def _own(label: str, results: Results, scenario: str, name: str, limits: tuple[float, float]) -> Line:
    ours, theirs = (results.get(server, scenario, name) for server in (OURS, MLX_LM))
    return Line(label, ours, theirs, ours, results.target(*limits, at_least=False))


def detail_lines(results: Results) -> Iterator[Line]:
    """All other figures: loads first, the ceiling last."""
    for scenario in results.scenarios():
        for metric in LOAD_METRICS:
            yield results.compare(f"{scenario}, {metric.label}", scenario, metric)
    for name in ("first_ttft", "second_ttft"):
        yield results.compare(
            f"second turn: {name.replace('_ttft', '')} TTFT, ms", "second turn", Metric(name, "", 1e3)
        )
    for name in ("alone_gap_p99", "beside_gap_p99", "prefill_ttft"):
        yield results.compare(f"long prefill: {name.replace('_', ' ')}, ms", "long prefill", Metric(name, "", 1e3))
    for name in ("mlx-lm greedy", "mlx-lm one sampler", "mlx-lm sampler a row"):
        figure = results.get(RAW, name, "tokens_per_second")
        yield Line(f"raw c={results.peak}, {name}, tokens/s", None, figure, None)
    yield Line(
        f"raw c={results.peak}, ours sampled, tokens/s",
        results.get(RAW, "ours sampled", "tokens_per_second"),
        None,
        None,
    )
    limit = results.get(RAW, "bandwidth", "tokens_per_second")
    yield Line(f"bandwidth limit at batch {results.peak}, tokens/s", limit, limit, None)


def render(content: Mapping[str, Any]) -> str:
    """The table of one run's results, as aligned Markdown."""
    results = Results(content)
    lines = [line.cells() for line in [*promised_lines(results), *detail_lines(results)]]
    kept = [cells for cells in lines if any(cell != DASH for cell in cells[1:4])]
    return _align([HEAD, *kept])


def _align(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
