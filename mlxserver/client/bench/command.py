"""Benchmarks from their options to their output and files, for the command line and for the shell."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxserver.client.api import ChatClient
from mlxserver.client.bench import embeddings
from mlxserver.client.bench.figures import figures, to_object, write
from mlxserver.client.bench.interference import MEASURES, Interference, Phase, to_objects, to_rows
from mlxserver.client.bench.load import Run, run_level
from mlxserver.client.bench.options import make_plan
from mlxserver.client.bench.plan import Plan
from mlxserver.client.bench.plots import format_plots, write_picture
from mlxserver.client.bench.views import format_level_lines, format_levels, progress_bar
from mlxserver.client.errors import SettingInvalid
from mlxserver.client.views import console, print_line, print_status

INTERFERENCE_REQUESTS = 8


async def benchmark(
    client: ChatClient, options: Namespace, models: tuple[str, ...], params: Mapping[str, Any], *, as_json: bool
) -> bool:
    """Run a benchmark and show it; whether every request was answered. Raises ClientError."""
    if await embeddings.are_embedding(client, models):
        return await embeddings.benchmark(client, options, models, as_json=as_json)
    plan = make_plan(options, models, params)
    runs = []
    with progress_bar(console(stderr=True)) as bar:
        for level in plan.levels:
            task = bar.add_task(f"{level.model} {level.name}", total=plan.requests)
            runs.append(await run_level(client, plan, level, lambda task=task: bar.advance(task)))  # type: ignore[misc]
    _show(plan, runs, console(), as_json)
    if options.output:
        write(options.output, [figures(run, plan.slo) for run in runs], to_object(plan, runs))
    if options.plot:
        write_picture(options.plot, runs)
    return not any(run.errors for run in runs)


async def interference(
    client: ChatClient, options: Namespace, models: tuple[str, ...], params: Mapping[str, Any], *, as_json: bool
) -> bool:
    """Measure how much work on the second model slows the first one down, and show it.

    Returns whether every phase ran and every request was answered. Raises ClientError.
    """
    if len(models) != 2:
        raise SettingInvalid("--interference", ",".join(models), "two models, such as a,b")
    for name in ("rate", "plot"):
        if getattr(options, name):
            raise SettingInvalid(f"--{name}", "with --interference", "one of the two")
    options.requests = options.requests or INTERFERENCE_REQUESTS
    options.concurrency = options.concurrency or (1,)
    plan = make_plan(options, models[:1], params)
    measured = Interference(client, plan, *models)
    phases: list[Phase] = []
    with progress_bar(console(stderr=True)) as bar:
        for name, work in measured.phases:
            task = bar.add_task(f"{models[0]}: {name}", total=plan.requests)
            phases.append(await measured.run(name, work, lambda task=task: bar.advance(task)))  # type: ignore[misc]
    objects = to_objects(phases, plan)
    _show_interference(models[0], objects, console(), as_json)
    if options.output:
        write(options.output, to_rows(objects), objects)
    return all(phase.run and not phase.run.errors for phase in phases)


def format_interference(model: str, phases: list[dict[str, Any]]) -> Table:
    """A table with one row per phase: each figure, and its ratio to that of the model alone."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(Text(model))
    for name in MEASURES:
        table.add_column(name, justify="right", no_wrap=True)
    for phase in phases:
        table.add_row(Text(phase["phase"]), *_cells(phase))
    return table


def _cells(phase: dict[str, Any]) -> list[str]:
    if phase["figures"] is None:
        return [phase["problem"], *[""] * (len(MEASURES) - 1)]
    return [_cell(phase["figures"][name], phase["ratios"][name]) for name in MEASURES.values()]


def _cell(value: float | None, ratio: float | None) -> str:
    return "-" if value is None or ratio is None else f"{value:.1f} (x{ratio:.2f})"


def _show_interference(model: str, phases: list[dict[str, Any]], stdout: Console, as_json: bool) -> None:
    if as_json:
        print_line(json.dumps(phases, indent=2))
    elif stdout.is_terminal:
        stdout.print(format_interference(model, phases))
    else:
        rows = [["", *MEASURES], *([phase["phase"], *_cells(phase)] for phase in phases)]
        print_line("\n".join("\t".join(row) for row in rows))


def _show(plan: Plan, runs: list[Run], stdout: Console, as_json: bool) -> None:
    levels = [figures(run, plan.slo) for run in runs]
    if as_json:
        print_line(json.dumps(to_object(plan, runs), indent=2))
    elif stdout.is_terminal:
        stdout.print(format_levels(levels))
        stdout.print(format_plots(runs, min(stdout.width, 100)))
    else:
        print_line(format_level_lines(levels).rstrip("\n"))
    for run in runs:
        for error in sorted(set(run.errors)):
            print_status(f"{run.level.model} {run.level.name}: {run.errors.count(error)} x {error}", style="red")
