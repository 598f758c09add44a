"""Plots of a benchmark: tokens/s and TTFT over the load, and the distribution of latency; for a terminal and as PNG.

Rule: the axis of the load is logarithmic, as loads are mostly doubled, and has ticks at the measured loads alone.

The two libraries are imported where they are used: importing them takes longer than most commands do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log2, log10
from pathlib import Path
from typing import Any

from rich.text import Text

from mlxserver.client.bench.figures import Figures, figures
from mlxserver.client.bench.load import Run
from mlxserver.client.errors import FileUnusable, SettingInvalid
from mlxserver.client.stats import milliseconds

HEIGHT = 14
FRAME_COLUMNS = 10  # of a plot for the terminal: its border, the tick labels of its y axis, the legend's border
BINS = 20
MAX_TICKS = 5
PNG_INCHES = (15, 4.5)


@dataclass(frozen=True, slots=True)
class Line:
    """Figures of one model over its loads."""

    model: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]


def load_name(runs: Sequence[Run]) -> str:
    """The unit of the loads."""
    return "requests/s" if any(run.level.rate is not None for run in runs) else "concurrency"


def lines(runs: Sequence[Run], figure: str) -> list[Line]:
    """A figure over the load: one line per model, with the levels where the figure is known."""
    points: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        level: Figures = figures(run, None)
        load = level["concurrency"] if level["rate"] is None else level["rate"]
        if level[figure] is not None:
            points.setdefault(run.level.model, []).append((load, level[figure]))
    return [Line(model, *zip(*sorted(known), strict=True)) for model, known in points.items()]


def measured(known: Iterable[Line]) -> list[float]:
    """The measured loads of some lines, each once."""
    return sorted({x for line in known for x in line.xs})


def latencies(runs: Sequence[Run]) -> dict[str, list[float]]:
    """End-to-end latencies of each model's requests in milliseconds, over all levels."""
    known: dict[str, list[float]] = {}
    for run in runs:
        values = (milliseconds(timing.latency) for timing in run.timings)
        known.setdefault(run.level.model, []).extend(value for value in values if value is not None)
    return {model: values for model, values in known.items() if values}


def ticks(lowest: float, highest: float) -> list[float]:
    """At most MAX_TICKS + 1 round numbers between the ends of a range."""
    rough = (highest - lowest) / MAX_TICKS or 1.0
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * n, 9) for n in range(ceil(lowest / step), floor(highest / step) + 1)]


def format_plots(runs: Sequence[Run], width: int) -> Text:
    """The three plots, one below the other, for a terminal of `width` columns."""
    parts = [
        _terminal_lines("tokens/s in total", runs, "tokens_per_second", width),
        _terminal_lines("TTFT p50, ms", runs, "ttft_p50_ms", width),
        _terminal_histogram(runs, width),
    ]
    return Text("\n").join(Text.from_ansi(part) for part in parts if part)


def check_picture(path: Path) -> None:
    """Raises SettingInvalid for a name that does not end in .png."""
    if path.suffix.lower() != ".png":
        raise SettingInvalid("plot", str(path), "a name that ends in .png")


def write_picture(path: Path, runs: Sequence[Run]) -> None:
    """Write the three plots, side by side, to a file. Raises FileUnusable."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=PNG_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    speed, ttft, latency = figure.subplots(1, 3)
    for axes, name, title in (
        (speed, "tokens_per_second", "tokens/s in total"),
        (ttft, "ttft_p50_ms", "TTFT p50, ms"),
    ):
        known = lines(runs, name)
        for line in known:
            axes.plot(line.xs, line.ys, marker="o", label=line.model)
        axes.set(title=title, xlabel=load_name(runs), xscale="log", ylim=(0, None))
        loads = measured(known)
        axes.set_xticks(loads, _labels(loads))
        axes.set_xticks([], minor=True)
    for model, values in latencies(runs).items():
        latency.hist(values, bins=BINS, label=model, alpha=0.6)
    latency.set(title="end-to-end latency", xlabel="ms", ylabel="requests")
    for axes in (speed, ttft, latency):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise FileUnusable(str(path), error.strerror or str(error)) from error


def _terminal_lines(title: str, runs: Sequence[Run], figure: str, width: int) -> str:
    known = [line for line in lines(runs, figure) if len(line.xs) > 1]
    if not known:
        return ""
    plot = _empty_plot(title, width)
    for line in known:
        plot.draw(plot.signal(list(map(log2, line.xs)), line.ys).lines().label(line.model))
    loads, top = measured(known), 1.05 * max(y for line in known for y in line.ys)
    axis = _extend_for_legend(plot, [line.model for line in known], width, log2(loads[0]), log2(loads[-1]))
    axis.ticks(list(map(log2, loads)), _labels(loads))
    plot.ruler("y", "left").lim(0, top).ticks(ticks(0, top), _labels(ticks(0, top)))
    plot.label(load_name(runs))
    return str(plot.build().string())


def _terminal_histogram(runs: Sequence[Run], width: int) -> str:
    known = {model: values for model, values in latencies(runs).items() if max(values) > min(values)}
    if not known:
        return ""
    plot = _empty_plot("end-to-end latency, ms (requests)", width)
    for model, values in known.items():
        plot.draw(plot.hist(values, BINS).label(model))
    lowest, highest = min(map(min, known.values())), max(map(max, known.values()))
    _extend_for_legend(plot, known, width, lowest, highest).ticks(
        ticks(lowest, highest), _labels(ticks(lowest, highest))
    )
    counts = [count for count in ticks(0, max(map(_tallest, known.values()))) if count == int(count)]
    plot.ruler("y", "left").ticks(counts, _labels(counts))
    return str(plot.build().string())


def _empty_plot(title: str, width: int) -> Any:
    from plotext import figure as plot  # type: ignore[import-untyped]

    plot.clear()
    plot.theme("simple")
    plot.plot_size(width, HEIGHT)
    plot.title(title)
    return plot


def _extend_for_legend(plot: Any, models: Iterable[str], width: int, lowest: float, highest: float) -> Any:
    """The x axis, extended at its left for the legend, which would cover the lines otherwise."""
    share = min(0.5, (max(map(len, models)) + FRAME_COLUMNS) / width)
    return plot.ruler("x", "lower").lim(lowest - (highest - lowest) * share / (1 - share), highest)


def _tallest(values: Sequence[float]) -> int:
    """The most requests in one of BINS."""
    lowest, width = min(values), (max(values) - min(values)) / BINS
    return max(Counter(min(BINS - 1, int((value - lowest) / width)) for value in values).values())


def _labels(values: Iterable[float]) -> list[str]:
    return [f"{value:.10g}" for value in values]
