"""Load generator: sends prepared requests to a server and returns a sample of each.

Rule 1: while a load runs, a response is stored as bytes and times (client/recorder.py); parsing comes afterwards.
Rule 2: a request that fails is a sample with an error. Only a failed warm-up ends a benchmark.
Rule 3: with a rate, a request is sent at its own time, however many are still running.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from mlxserver.client.api import ChatClient
from mlxserver.client.bench.plan import Level, Plan
from mlxserver.client.errors import ClientError
from mlxserver.client.events import Content, Reasoning
from mlxserver.client.recorder import PreparedRequest, Recording
from mlxserver.client.stats import Timing, timing

WARMUP_CONCURRENCY = 64

Outcome = Recording | ClientError


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: its timing, or the error that it failed with.

    text: the generated text, reasoning included. connecting: seconds that the connection took, in no latency.
    """

    timing: Timing | None = None
    error: ClientError | None = None
    text: str = ""
    connecting: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One level that ran."""

    level: Level
    samples: tuple[Sample, ...]

    @property
    def timings(self) -> list[Timing]:
        """Timings of the requests that were answered whole."""
        return [sample.timing for sample in self.samples if sample.timing]

    @property
    def errors(self) -> list[str]:
        """Messages of the errors of all others."""
        return [str(sample.error) for sample in self.samples if sample.error]


async def run_level(client: ChatClient, plan: Plan, level: Level, on_done: Callable[[], None] = lambda: None) -> Run:
    """Run one level. on_done is called at the end of each request. Raises ClientError when the warm-up fails."""
    requests = [client.prepare(prompt, level.model, **plan.params) for prompt in plan.questions()]
    for sample in await closed_loop(requests[: plan.warmup], level.concurrency or WARMUP_CONCURRENCY):
        if sample.error:
            raise sample.error
    if level.rate is None:
        samples = await closed_loop(requests, level.concurrency or 1, on_done)
    else:
        samples = await open_loop(requests, plan.arrivals(level.rate), on_done)
    return Run(level, tuple(samples))


async def closed_loop(
    requests: Sequence[PreparedRequest], clients: int, on_done: Callable[[], None] = lambda: None
) -> list[Sample]:
    """Send all requests, `clients` at a time: each client sends its next one as soon as its last one ended.

    Returns the samples in the order in which the requests ended.
    """
    waiting, outcomes = iter(requests), list[Outcome]()

    async def run_client() -> None:
        for request in waiting:
            outcomes.append(await send(request))
            on_done()

    with without_collector():
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(clients, len(requests))):
                tasks.create_task(run_client())
    return [read(outcome) for outcome in outcomes]


async def open_loop(
    requests: Sequence[PreparedRequest], arrivals: Sequence[float], on_done: Callable[[], None] = lambda: None
) -> list[Sample]:
    """Send each request at its own time. arrivals: seconds from now, ascending. Samples as closed_loop() gives them."""
    outcomes = list[Outcome]()

    async def run_one(request: PreparedRequest) -> None:
        outcomes.append(await send(request))
        on_done()

    with without_collector():
        start = perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for request, at in zip(requests, arrivals, strict=True):
                await asyncio.sleep(start + at - perf_counter())
                tasks.create_task(run_one(request))
    return [read(outcome) for outcome in outcomes]


async def send(request: PreparedRequest) -> Outcome:
    """Send one request; its recording, or the error of connecting."""
    try:
        return await request()
    except ClientError as error:
        return error


def read(outcome: Outcome) -> Sample:
    """Parse what a request gave."""
    if isinstance(outcome, ClientError):
        return Sample(error=outcome)
    try:
        events = outcome.events()
    except ClientError as error:
        return Sample(error=error, connecting=outcome.connecting)
    text = "".join(event.text for event in events if isinstance(event, Reasoning | Content))
    return Sample(timing(outcome.start, events), text=text, connecting=outcome.connecting)


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector off during a measurement: a collection would delay arrivals."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
