"""Benchmark of embedding models: texts and tokens per second of clients that send lists of texts.

Rule: the same plan and seed send the same texts in the same order. A request that fails is counted as an error; only a
      failed warm-up ends a benchmark.
"""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from rich.table import Table
from rich.text import Text

from mlxserver.client.api import ChatClient
from mlxserver.client.bench.figures import Figures, write
from mlxserver.client.bench.options import make_plan
from mlxserver.client.bench.plan import Level, Plan
from mlxserver.client.bench.views import progress_bar
from mlxserver.client.conversation import content_text
from mlxserver.client.errors import ApiError, ClientError, SettingInvalid
from mlxserver.client.stats import distribution, milliseconds
from mlxserver.client.views import console, print_line, print_status

TEXTS = 16  # of a request
FIGURES = ("texts_per_second", "tokens_per_second", "requests_per_second", "p50_ms", "p95_ms", "p99_ms", "errors")


@dataclass(frozen=True, slots=True)
class Embedded:
    """One request: seconds until its vectors were there, and its tokens; or the error that it failed with."""

    seconds: float = 0.0
    tokens: int = 0
    error: str | None = None


async def are_embedding(client: ChatClient, models: Sequence[str]) -> bool:
    """Whether the models make vectors, as far as the server states it. Raises SettingInvalid where only some do."""
    kinds = [await _is_embedding(client, model) for model in models]
    if len(set(kinds)) > 1:
        raise SettingInvalid("models", ",".join(models), "models of one kind: these make vectors and text")
    return kinds[0]


async def benchmark(client: ChatClient, options: Namespace, models: tuple[str, ...], *, as_json: bool) -> bool:
    """Run a benchmark and show it; whether every request was answered. Raises ClientError."""
    for name in ("rate", "slo", "plot"):
        if getattr(options, name):
            raise SettingInvalid(f"--{name}", "with an embedding model", "a model that generates text")
    plan = make_plan(options, models, {})
    levels, errors = list[Figures](), list[str]()
    with progress_bar(console(stderr=True)) as bar:
        for level in plan.levels:
            task = bar.add_task(f"{level.model} {level.name}", total=plan.requests)
            seconds, done = await _run(client, plan, level, lambda task=task: bar.advance(task))  # type: ignore[misc]
            levels.append(figures(level, seconds, done))
            errors += [f"{level.model} {level.name}: {one.error}" for one in done if one.error]
    _show(levels, as_json=as_json)
    for error in dict.fromkeys(errors):
        print_status(f"{errors.count(error)} x {error}", style="red")
    if options.output:
        write(options.output, levels, levels)
    return not errors


def figures(level: Level, seconds: float, done: Sequence[Embedded]) -> Figures:
    """The figures of one level, flat: rates per second, times in milliseconds. seconds: that the level took."""
    answered = [one for one in done if one.error is None]
    latency = distribution([one.seconds for one in answered])

    def per_second(total: float) -> float | None:
        return total / seconds if seconds > 0 else None

    return {
        "model": level.model,
        "load": level.name,
        "concurrency": level.concurrency,
        "requests": len(done),
        "errors": len(done) - len(answered),
        "texts": len(answered) * TEXTS,
        "tokens": sum(one.tokens for one in answered),
        "seconds": seconds,
        "texts_per_second": per_second(len(answered) * TEXTS),
        "tokens_per_second": per_second(sum(one.tokens for one in answered)),
        "requests_per_second": per_second(len(answered)),
        **{f"{name}_ms": milliseconds(getattr(latency, name)) if latency else None for name in ("p50", "p95", "p99")},
    }


async def _is_embedding(client: ChatClient, model: str) -> bool:
    with suppress(ApiError):  # of servers that describe no single model
        return (await client.model(model)).is_embedding
    return False


def requests_of(plan: Plan) -> list[list[str]]:
    """The texts of each request of a level."""
    texts = [content_text(message) for prompt in plan.questions() for message in prompt]
    return [[texts[(first + n) % len(texts)] for n in range(TEXTS)] for first in range(plan.requests)]


async def _run(
    client: ChatClient, plan: Plan, level: Level, on_done: Callable[[], None]
) -> tuple[float, list[Embedded]]:
    """Run one level: the seconds that it took, and its requests as they ended. Raises ClientError."""
    requests = requests_of(plan)
    for texts in requests[: plan.warmup]:
        await client.embed(texts, level.model)
    waiting, done = iter(requests), list[Embedded]()

    async def run_client() -> None:
        for texts in waiting:
            done.append(await _embed(client, level.model, texts))
            on_done()

    start = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(level.concurrency or 1, plan.requests)):
            tasks.create_task(run_client())
    return perf_counter() - start, done


async def _embed(client: ChatClient, model: str, texts: Sequence[str]) -> Embedded:
    start = perf_counter()
    try:
        made = await client.embed(texts, model)
    except ClientError as error:
        return Embedded(error=str(error))
    return Embedded(perf_counter() - start, made.prompt_tokens)


def _show(levels: Sequence[Figures], *, as_json: bool) -> None:
    stdout = console()
    if as_json:
        return print_line(json.dumps({"levels": levels}, indent=2))
    rows = [["", *(f"{level['model']} {level['load']}" for level in levels)]]
    rows += [[name.replace("_", " "), *(_cell(level[name]) for level in levels)] for name in FIGURES]
    if not stdout.is_terminal:
        return print_line("\n".join("\t".join(row) for row in rows))
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in rows[0]:
        table.add_column(Text(name))
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return stdout.print(table)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
