"""Load on a server: requests sent as a plan says, and what became of each.

Rule 1: while a level runs nothing is read of an answer but bytes and times; figures are made afterwards.
Rule 2: a request that fails is a Sample with an error. Only a warm-up that fails ends the benchmark.
Rule 3: with a rate, a request is sent when its time has come, however many are still running.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from mlxserver.client.api import ChatClient
from mlxserver.client.bench.plan import Level, Plan, Prompt
from mlxserver.client.errors import ClientError
from mlxserver.client.recorder import Recording
from mlxserver.client.stats import Timing, timing

WARMUP_AT_ONCE = 64

Send = Callable[[Prompt], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: its figures, or why it failed."""

    timing: Timing | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One level that ran."""

    level: Level
    samples: tuple[Sample, ...]

    @property
    def timings(self) -> list[Timing]:
        """Of the requests that were answered whole."""
        return [sample.timing for sample in self.samples if sample.timing]

    @property
    def errors(self) -> list[str]:
        """Of the others."""
        return [sample.error for sample in self.samples if sample.error is not None]


async def run_level(client: ChatClient, plan: Plan, level: Level, on_done: Callable[[], None] = lambda: None) -> Run:
    """Run one level. on_done is called at each request's end. Raises ClientError when the warm-up fails."""
    await warm_up(client, plan, level)
    outcomes: list[Recording | ClientError] = []

    async def send(prompt: Prompt) -> None:
        try:
            outcomes.append(await client.record(prompt, level.model, **plan.params))
        except ClientError as error:
            outcomes.append(error)
        on_done()

    with _without_collector():
        if level.rate is None:
            await _closed_loop(plan.questions(), level.concurrency or 1, send)
        else:
            await _open_loop(plan.questions(), plan.arrivals(level.rate), send)
    return Run(level, tuple(map(_sample, outcomes)))


async def warm_up(client: ChatClient, plan: Plan, level: Level) -> None:
    """Requests that don't count, as many at once as in the level. Raises ClientError."""

    async def send(prompt: Prompt) -> None:
        (await client.record(prompt, level.model, **plan.params)).events()

    try:
        await _closed_loop(plan.questions()[: plan.warmup], level.concurrency or WARMUP_AT_ONCE, send)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def _closed_loop(prompts: Sequence[Prompt], clients: int, send: Send) -> None:
    waiting = iter(prompts)

    async def work() -> None:
        for prompt in waiting:
            await send(prompt)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(clients, len(prompts))):
            tasks.create_task(work())


async def _open_loop(prompts: Sequence[Prompt], arrivals: Sequence[float], send: Send) -> None:
    start = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for prompt, at in zip(prompts, arrivals, strict=True):
            await asyncio.sleep(start + at - perf_counter())
            tasks.create_task(send(prompt))


def _sample(outcome: Recording | ClientError) -> Sample:
    try:
        if isinstance(outcome, ClientError):
            raise outcome
        return Sample(timing(outcome.start, outcome.events()))
    except ClientError as error:
        return Sample(error=str(error))


@contextmanager
def _without_collector() -> Iterator[None]:
    """The garbage collector would stop the world in the middle of a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
