"""Table of a run's results. Pure, except for reading the file.

Rule 1: a ratio is the median of the rounds' own ratios: what both sides had in the same minute is compared.
Rule 2: a row whose two sides were not both measured is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.servers import LLAMA, MLX_LM, OURS, RAPID_MLX, VLLM_MLX
from benchmarks.settings import BANDWIDTH, RAW, RAW_MLX_LM

SPECULATION, REFERENCE = "speculation", "sentence-transformers"
HEAD = ("measure", "A / B", "A", "B", "ratio", "rounds", "target", "met")
DASH = "-"


@dataclass(frozen=True, slots=True)
class Metric:
    """Figure of a load. factor: from its unit to the unit shown."""

    key: str
    label: str
    factor: float = 1.0


RATE = Metric("tokens_per_second", "tokens/s")
TTFT = Metric("ttft_p50", "TTFT p50, ms", 1000)
GAP = Metric("gap_p99", "inter-token p99, ms", 1000)
LOAD_METRICS = (RATE, TTFT, GAP)
DECODE = Metric("decode_tokens_per_second", "tokens/s")


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


def at_least(*limits: float) -> Sequence[Target]:
    """Targets by column: CPU, GPU in 16 bits, GPU in 4 bits; the last limit stands for those behind it."""
    return _columns(limits, at_least=True)


def at_most(*limits: float) -> Sequence[Target]:
    """Targets by column, as in at_least()."""
    return _columns(limits, at_least=False)


def _columns(limits: Sequence[float], *, at_least: bool) -> Sequence[Target]:
    return [Target(limits[min(column, len(limits) - 1)], at_least) for column in range(3)]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the results, and the name that its part has in the table."""

    part: str
    scenario: str
    key: str
    label: str = ""

    @property
    def name(self) -> str:
        """The name in the table."""
        return self.label or self.part


@dataclass(frozen=True, slots=True)
class Row:
    """Row of the table: one figure over another. targets: by column; none for a row that has no target."""

    measure: str
    over: Figure
    under: Figure
    targets: Sequence[Target] = ()
    factor: float = 1.0


def compare(
    scenario: str, metric: Metric, over: str, under: str, targets: Sequence[Target] = (), measure: str = ""
) -> Row:
    """The same figure of two parts."""
    a, b = (Figure(part, scenario, metric.key) for part in (over, under))
    return Row(f"{measure or scenario}, {metric.label}", a, b, targets, metric.factor)


def within(
    scenario: str,
    over: tuple[str, str],
    under: tuple[str, str],
    targets: Sequence[Target],
    measure: str,
    part: str = OURS,
) -> Row:
    """Two figures of one scenario of a part, each with its name in the table; times are shown in ms."""
    a, b = (Figure(part, scenario, key, label) for key, label in (over, under))
    return Row(f"{scenario}, {measure}, ms", a, b, targets, 1000)


def rows(peak: int, raw_batch: int, loads: Sequence[str]) -> Iterator[Row]:
    """All rows that a table may have. loads: names of the closed loops, as in "sampled c=4"."""
    at = f"sampled c={peak}"
    yield from promised_rows(at, raw_batch)
    for name, limit in (("gguf c=1", 0.7), ("gguf c=4", 0.8), ("gguf c=16", 1.2)):
        yield compare(name, RATE, OURS, LLAMA, at_least(limit))
    yield from session_rows()
    yield compare("embeddings", RATE, OURS, REFERENCE, at_least(1.0))
    for name in dict.fromkeys(("sampled c=1", at)):
        for peer in (VLLM_MLX, RAPID_MLX):
            yield from (compare(name, metric, OURS, peer) for metric in LOAD_METRICS)
    yield from full_rows(peak)
    shown = {("sampled c=1", RATE), *((at, metric) for metric in LOAD_METRICS), (f"seeded c={peak}", RATE)}
    for name in loads:
        for metric in LOAD_METRICS:
            if (name, metric) not in shown:
                yield compare(name, metric, OURS, MLX_LM)
            if name.startswith("gguf") and metric != RATE:
                yield compare(name, metric, OURS, LLAMA)


def promised_rows(at: str, raw_batch: int) -> Iterator[Row]:
    """Against mlx_lm.server, the raw engine, and speculation."""
    yield compare("sampled c=1", RATE, OURS, MLX_LM, at_least(2.0, 1.5, 1.8))
    yield compare(at, RATE, OURS, MLX_LM, at_least(2.2, 4.5, 6))
    yield compare(at, TTFT, OURS, MLX_LM, at_most(0.45, 0.25, 0.4))
    yield compare(at, GAP, OURS, MLX_LM, at_most(0.45, 0.35, 0.5))
    distinct, greedy = (Figure(RAW, f"{kind} batch c={raw_batch}", DECODE.key, kind) for kind in ("distinct", "greedy"))
    yield Row(f"raw engine c={raw_batch}, {DECODE.label}", distinct, greedy, at_least(0.85, 0.85, 0.9))
    yield Row(f"{at}, {RATE.label}", Figure(OURS, at, RATE.key, "HTTP"), Figure(RAW, at, RATE.key),
              at_least(0.9, 0.93, 0.95))  # fmt: skip
    for name, targets in (("edit task", at_least(1.5, 1.8, 1.8)), ("free text", at_least(0.98))):
        on, off = (Figure(SPECULATION, name, key, f"speculation {key}") for key in ("on", "off"))
        yield Row(f"{name}, {RATE.label}", on, off, targets)


def session_rows() -> Iterator[Row]:
    """An agent's session, and short requests beside a long conversation."""
    turn = Metric("turn_ttft", "TTFT of later turns, ms", 1000)
    yield within("agent session", ("turn_ttft", "later turns"), ("cold_ttft", "cold"), at_most(0.1), "TTFT")
    yield compare("agent session", turn, OURS, MLX_LM)
    for key, label in (("ttft", "TTFT p50"), ("gap", "inter-token p50")):
        pair = (f"beside_{key}_p50", "beside"), (f"alone_{key}_p50", "alone")
        yield within("short beside long", *pair, at_most(1.3), label)
        yield compare("short beside long", Metric(pair[0][0], f"{label} beside, ms", 1000), OURS, MLX_LM)


def full_rows(peak: int) -> Iterator[Row]:
    """What is measured only if everything is asked for."""
    yield compare(f"seeded c={peak}", RATE, OURS, MLX_LM, at_least(4, 10))
    yield compare("two models", Metric("overall_tokens_per_second", RATE.label), OURS, MLX_LM, at_least(3, 5))
    yield within("second turn", ("second_ttft", "second"), ("first_ttft", "first"), at_most(0.2, 0.3), "TTFT")
    beside = "beside_gap_p99"
    yield within("long prefill", (beside, "beside"), ("alone_gap_p99", "alone"), at_most(3, 2), "inter-token p99")
    yield compare("long prefill", Metric(beside, "inter-token p99 beside, ms", 1000), OURS, MLX_LM, at_most(1.0))
    for kind in ("greedy", "sampled", "sampler a row"):
        ours = Figure(RAW, f"sampled c={peak}", RATE.key, "raw")
        yield Row(f"raw engines c={peak}, {RATE.label}, theirs {kind}", ours,
                  Figure(RAW_MLX_LM, f"{kind} c={peak}", RATE.key))  # fmt: skip
    limit = Figure(RAW, BANDWIDTH, RATE.key, "memory's bandwidth")
    yield Row(f"sampled c={peak}, {RATE.label}", Figure(RAW, f"sampled c={peak}", RATE.key), limit)


class Results:
    """Results of a run: figures by round, part (a server, or "raw"), scenario and name."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._rounds: Sequence[Mapping[str, Any]] = content.get("rounds") or [content["results"]]
        sizes, self._model = content["settings"]["sizes"], content["settings"].get("model", {})
        self._is_gpu: bool = content["machine"]["gpu"]
        self.peak: int = sizes["concurrency"][-1]
        self.raw_batch: int = sizes["raw_batch"]

    @property
    def column(self) -> int:
        """Column of the targets."""
        return 0 if not self._is_gpu else 2 if self._model.get("dtype") == "4bit" else 1

    def loads(self) -> list[str]:
        """The closed loops of our server."""
        names = [name for results in self._rounds for name in results.get(OURS, {})]
        return [name for name in dict.fromkeys(names) if " c=" in name]

    def each(self, figure: Figure) -> list[float | None]:
        """A figure round by round; None where it was not measured."""
        values = [results.get(figure.part, {}).get(figure.scenario, {}).get(figure.key) for results in self._rounds]
        return [None if value is None or isnan(value) else value for value in values]

    def cells(self, row: Row) -> tuple[str, ...] | None:
        """A row as text; None if no round has both figures."""
        pairs = [(a, b) for a, b in zip(self.each(row.over), self.each(row.under), strict=True) if a is not None and b]
        if not pairs:
            return None
        over, under = (median(values) * row.factor for values in zip(*pairs, strict=True))
        ratios = [a / b for a, b in pairs]
        ratio, target = median(ratios), row.targets[self.column] if row.targets else None
        return (
            row.measure,
            f"{row.over.name} / {row.under.name}",
            *map(_number, (over, under, ratio)),
            " ".join(map(_number, ratios)),
            str(target or DASH),
            DASH if target is None else "yes" if target.is_met(ratio) else "no",
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def describe(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items() if version)
    device = f"{machine['device']}, " if machine["gpu"] else ""
    memory = machine["memory"] / (1 << 30)
    return (
        f"{device}{machine['processor']}, {machine['cores']} cores, {memory:.0f} GiB, {machine['system']}, {versions}"
    )


def render(content: Mapping[str, Any]) -> str:
    """The table of one run's results, as aligned Markdown."""
    results = Results(content)
    lines = map(results.cells, rows(results.peak, results.raw_batch, results.loads()))
    return _align([HEAD, *(line for line in lines if line)])


def _align(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    cells = [[*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])] for row in rows]
    rule = [*("-" * width for width in widths[:2]), *("-" * (width - 1) + ":" for width in widths[2:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
