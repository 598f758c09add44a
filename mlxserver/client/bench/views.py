"""Views of a benchmark: a progress bar on stderr, a table, plain lines for programs. format_* is pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mlxserver.client.bench.figures import Figures

LATENCIES = {
    "ttft": "TTFT ms",
    "itl": "inter-token ms",
    "gap": "between chunks ms",
    "e2e": "end to end ms",
}


def progress_bar(console: Console) -> Progress:
    """A bar per level, removed at the end; hidden where the console is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def format_levels(levels: Sequence[Figures]) -> Group:
    """One table per model: a column per load, a row per measure; latencies as p50 / p95 / p99."""
    models = dict.fromkeys(level["model"] for level in levels)
    return Group(*(_format_model(model, [one for one in levels if one["model"] == model]) for model in models))


def format_level_lines(levels: Sequence[Figures]) -> str:
    """All levels side by side, with tabs between."""
    names = ["", *(f"{level['model']} {level['load']}" for level in levels)]
    lines = [names, *([name, *map(cell, levels)] for name, cell in rows(levels))]
    return "".join("\t".join(line) + "\n" for line in lines)


def _format_model(model: str, levels: Sequence[Figures]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(Text(model))
    for level in levels:
        table.add_column(level["load"], justify="right", no_wrap=True)
    for name, cell in rows(levels):
        table.add_row(Text(name), *(cell(level) for level in levels))
    table.add_row()
    return table


def rows(levels: Sequence[Figures]) -> list[tuple[str, Callable[[Figures], str]]]:
    """The measures: the name of each, and the function that formats its cell."""
    table: list[tuple[str, Callable[[Figures], str]]] = [
        (f"{title}, p50 / p95 / p99", _latency(name)) for name, title in LATENCIES.items()
    ]
    table += [
        ("tokens/s of a request, p50", _number("request_tokens_per_second", 1)),
        ("tokens/s in total", _number("tokens_per_second", 1)),
        ("requests/s", _number("requests_per_second", 2)),
        ("requests", _number("requests", 0)),
        ("errors", _number("errors", 0)),
        ("cached prompt tokens", _cached),
    ]
    if any(level["goodput_share"] is not None for level in levels):
        table.append(("goodput, requests/s", _goodput))
    return table


def _latency(name: str) -> Callable[[Figures], str]:
    return lambda level: " / ".join(_digits(level[f"{name}_{p}_ms"]) for p in ("p50", "p95", "p99"))


def _number(name: str, decimals: int) -> Callable[[Figures], str]:
    return lambda level: "-" if level[name] is None else f"{level[name]:.{decimals}f}"


def _cached(level: Figures) -> str:
    return "-" if level["prompt_tokens"] is None else f"{level['cached_tokens']} of {level['prompt_tokens']}"


def _goodput(level: Figures) -> str:
    rate, share = level["goodput_requests_per_second"], level["goodput_share"]
    return "-" if rate is None or share is None else f"{rate:.2f} ({share:.0%})"


def _digits(value: float | None) -> str:
    """A number with about three significant digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
