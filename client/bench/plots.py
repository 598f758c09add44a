"""A benchmark as pictures: tokens/s and TTFT over the load, and how TTFT is spread; for a terminal and as PNG.

The two libraries are imported where they are used: they take longer to import than most commands take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from client.bench.figures import Figures, figures
from client.bench.load import Run
from client.errors import FileUnusable, SettingInvalid
from client.status import milliseconds

HEIGHT = 14
BINS = 20
PNG_INCHES = (15, 4.5)


@dataclass(frozen=True, slots=True)
class Line:
    """One model's figures over its loads."""

    model: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]


def load_name(runs: Sequence[Run]) -> str:
    """What the loads are counted in."""
    return "requests/s" if any(run.level.rate is not None for run in runs) else "concurrency"


def lines(runs: Sequence[Run], figure: str) -> list[Line]:
    """A figure over the load, a line for each model, of the levels where it is known."""
    points: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        level: Figures = figures(run, None)
        load = level["concurrency"] if level["rate"] is None else level["rate"]
        if level[figure] is not None:
            points.setdefault(run.level.model, []).append((load, level[figure]))
    return [Line(model, *zip(*sorted(known), strict=True)) for model, known in points.items()]


def latencies(runs: Sequence[Run]) -> dict[str, list[float]]:
    """End-to-end times of each model's requests in milliseconds, of all levels."""
    spread: dict[str, list[float]] = {}
    for run in runs:
        values = (milliseconds(timing.latency) for timing in run.timings)
        spread.setdefault(run.level.model, []).extend(value for value in values if value is not None)
    return {model: values for model, values in spread.items() if values}


def format_plots(runs: Sequence[Run], width: int) -> Text:
    """The three plots below each other, for a terminal of `width` columns."""
    parts = [
        _terminal_lines("tokens/s in total", runs, "tokens_per_second", width),
        _terminal_lines("TTFT p50, ms", runs, "ttft_p50_ms", width),
        _terminal_histogram(runs, width),
    ]
    return Text("\n").join(Text.from_ansi(part) for part in parts if part)


def check_picture(path: Path) -> None:
    """Raises SettingInvalid for a name that is no picture's."""
    if path.suffix.lower() != ".png":
        raise SettingInvalid("plot", str(path), "a name that ends in .png")


def write_picture(path: Path, runs: Sequence[Run]) -> None:
    """The three plots beside each other. Raises FileUnusable."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=PNG_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    speed, ttft, spread = figure.subplots(1, 3)
    for axes, name, title in (
        (speed, "tokens_per_second", "tokens/s in total"),
        (ttft, "ttft_p50_ms", "TTFT p50, ms"),
    ):
        for line in lines(runs, name):
            axes.plot(line.xs, line.ys, marker="o", label=line.model)
        axes.set(title=title, xlabel=load_name(runs), ylim=(0, None))
    for model, values in latencies(runs).items():
        spread.hist(values, bins=BINS, label=model, alpha=0.6)
    spread.set(title="end-to-end latency", xlabel="ms", ylabel="requests")
    for axes in (speed, ttft, spread):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise FileUnusable(str(path), error.strerror or str(error)) from error


def _terminal_lines(title: str, runs: Sequence[Run], figure: str, width: int) -> str:
    from plotext import figure as plot  # type: ignore[import-untyped]

    plot.clear()
    plot.theme("simple")
    plot.plot_size(width, HEIGHT)
    known = [line for line in lines(runs, figure) if len(line.xs) > 1]
    for line in known:
        plot.draw(plot.signal(line.xs, line.ys).lines().label(line.model))
    plot.ruler("y", "left").lim(0, 1.05 * max((y for line in known for y in line.ys), default=1.0))
    plot.title(title)
    plot.label(load_name(runs))
    return str(plot.build().string()) if known else ""


def _terminal_histogram(runs: Sequence[Run], width: int) -> str:
    from plotext import figure as plot  # type: ignore[import-untyped]

    plot.clear()
    plot.theme("simple")
    plot.plot_size(width, HEIGHT)
    known = latencies(runs)
    for model, values in known.items():
        if max(values) > min(values):
            plot.draw(plot.hist(values, BINS).label(model))
    plot.title("end-to-end latency, ms (requests)")
    return str(plot.build().string()) if known else ""
