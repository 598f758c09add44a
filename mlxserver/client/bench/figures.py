"""Figures of runs, as JSON and CSV. Pure, except for writing the file.

Rule 1: times are in milliseconds here, rates per second; what is not known is None, and an empty cell in CSV.
Rule 2: ttft, itl (mean time per token of one request) and e2e have one value per request; gap is between any two
        successive chunks of one stream, over all requests.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxserver.client.bench.load import Run, Sample
from mlxserver.client.bench.plan import Plan, Slo
from mlxserver.client.errors import FileUnusable, SettingInvalid
from mlxserver.client.stats import Distribution, Timing, milliseconds, summarise

STATISTICS = ("mean", "p50", "p95", "p99", "max")

Figures = dict[str, Any]


def figures(run: Run, slo: Slo | None) -> Figures:
    """The figures of one level, flat."""
    timings = run.timings
    summary = summarise(timings)
    met = None if slo is None else sum(slo.is_met(timing) for timing in timings)
    latencies = {"ttft": summary.ttft, "itl": summary.time_per_token, "gap": summary.gaps, "e2e": summary.latency}
    return {
        "model": run.level.model,
        "load": run.level.name,
        "concurrency": run.level.concurrency,
        "rate": run.level.rate,
        "requests": len(run.samples),
        "errors": len(run.errors),
        "seconds": summary.seconds,
        "prompt_tokens": _total(timings, "prompt_tokens"),
        "cached_tokens": _total(timings, "cached_tokens"),
        "tokens": summary.tokens,
        "tokens_per_second": summary.total_tokens_per_second,
        "request_tokens_per_second": summary.tokens_per_second.p50 if summary.tokens_per_second else None,
        "requests_per_second": summary.requests_per_second,
        "goodput_requests_per_second": met / summary.seconds if met is not None and summary.seconds > 0 else None,
        "goodput_share": met / len(run.samples) if met is not None and run.samples else None,
        **{
            f"{name}_{key}": value for name, latency in latencies.items() for key, value in _statistics(latency).items()
        },
    }


def to_object(plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """The whole benchmark: its settings, the figures of each level and every request."""
    settings = {
        "models": list(plan.models),
        "prompts": len(plan.prompts),
        "requests": plan.requests,
        "warmup": plan.warmup,
        "seed": plan.seed,
        "params": dict(plan.params),
    }
    levels = [{**figures(run, plan.slo), "samples": list(map(_sample, run.samples))} for run in runs]
    return {"settings": settings, "levels": levels}


def to_csv(rows: Sequence[Figures]) -> str:
    """One line per row, below a header of the first row's names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def check_output(path: Path) -> None:
    """Raises SettingInvalid for a name of neither format."""
    if path.suffix.lower() not in (".json", ".csv"):
        raise SettingInvalid("output", str(path), "a name that ends in .json or .csv")


def write(path: Path, rows: Sequence[Figures], whole: object) -> None:
    """Write figures to a file: the rows as CSV, or the whole as JSON. Raises FileUnusable."""
    text = to_csv(rows) if path.suffix.lower() == ".csv" else json.dumps(whole, indent=2) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileUnusable(str(path), error.strerror or str(error)) from error


def _statistics(latency: Distribution | None) -> dict[str, float | None]:
    return {f"{key}_ms": milliseconds(getattr(latency, key)) if latency else None for key in STATISTICS}


def _total(timings: Sequence[Timing], count: str) -> int | None:
    usages = [timing.usage for timing in timings if timing.usage]
    return sum(getattr(usage, count) for usage in usages) if usages else None


def _sample(sample: Sample) -> dict[str, Any]:
    timing = sample.timing
    if timing is None:
        return {"error": str(sample.error)}
    return {
        "start": timing.start,
        "ttft_ms": milliseconds(timing.ttft),
        "itl_ms": milliseconds(timing.time_per_token),
        "e2e_ms": milliseconds(timing.latency),
        "tokens": timing.tokens,
    }
