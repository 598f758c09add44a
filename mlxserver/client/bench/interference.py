"""Interference of two models: the same requests to one model alone, and during each kind of work of another one.

Rule 1: in every phase the work has started before the first request is sent, and goes on until the last one has ended.
Rule 2: a phase that can't be run (on a server without unload) has a problem, and the others are run.
Rule 3: a ratio is the figure of the phase over that of the model alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mlxserver.client.api import ChatClient
from mlxserver.client.bench.figures import Figures, figures
from mlxserver.client.bench.load import Run, run_level
from mlxserver.client.bench.plan import Level, Plan, Prompt, user
from mlxserver.client.errors import ClientError, StreamBroken

LONG_PROMPT_WORDS = 1000
WORDS_PER_CONTEXT = 0.15  # a word is a number of up to four tokens, and the answer needs room
DECODING_TOKENS = 512

# One round of work of the other model; it calls its argument when the work has started.
Work = Callable[[Callable[[], None]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of work, and the run of the measured model during it; problem: why there is no run."""

    name: str
    run: Run | None = None
    problem: str | None = None


class Interference:
    """Measurement of `model` during the work of `other`, both on one server."""

    def __init__(self, client: ChatClient, plan: Plan, model: str, other: str) -> None:
        self._client, self._plan, self._other = client, plan, other
        self._level = Level(model, concurrency=plan.concurrency[0])
        self._random = random.Random(plan.seed)
        self._words = LONG_PROMPT_WORDS

    @property
    def phases(self) -> list[tuple[str, Work | None]]:
        """The phases in their order: the name and the work of each."""
        return [
            ("alone", None),
            (f"{self._other} decodes", self._decode),
            (f"{self._other} prefills a long prompt", self._prefill),
            (f"{self._other} is being loaded", self._load),
        ]

    async def run(self, name: str, work: Work | None, on_done: Callable[[], None]) -> Phase:
        """Run one phase. Raises ClientError if the model alone does not answer."""
        if work is None:
            await self._prepare()
            return Phase(name, await self._measure(on_done))
        try:
            async with _repeated(work):
                return Phase(name, await self._measure(on_done))
        except ClientError as error:
            return Phase(name, problem=str(error))

    async def _measure(self, on_done: Callable[[], None]) -> Run:
        return await run_level(self._client, self._plan, self._level, on_done)

    async def _prepare(self) -> None:
        """Load the other model, and choose the length of a prompt that fits into its context."""
        await self._send_one()
        with suppress(ClientError):
            context = (await self._client.model(self._other)).context_length
            self._words = min(LONG_PROMPT_WORDS, int((context or LONG_PROMPT_WORDS * 4) * WORDS_PER_CONTEXT))

    async def _decode(self, begin: Callable[[], None]) -> None:
        prompt = self._plan.prompts[0]
        params = {**self._plan.params, "max_tokens": DECODING_TOKENS}
        async with aclosing(self._client.stream(prompt, self._other, **params)) as events:
            async for _ in events:
                begin()

    async def _prefill(self, begin: Callable[[], None]) -> None:
        begin()
        await self._send_one(self.long_prompt())

    async def _load(self, begin: Callable[[], None]) -> None:
        await self._client.unload(self._other)
        begin()
        await self._send_one()

    async def _send_one(self, prompt: Prompt = user("Hi")) -> None:  # noqa: B008  (a prompt is a tuple)
        await self._client.complete(prompt, self._other, max_tokens=1)

    def long_prompt(self) -> Prompt:
        """A prompt that differs from every other in its first words: no prefix cache holds any of it."""
        return user(" ".join(str(self._random.randrange(1000)) for _ in range(self._words)))


@asynccontextmanager
async def _repeated(work: Work) -> AsyncGenerator[None, None]:
    """Repeat the work until the end of the block, which begins when the work has started.

    Raises what the first round raises, and StreamBroken if a later one fails.
    """
    started = asyncio.Event()

    async def repeat() -> None:
        while True:
            await work(started.set)

    task, start = asyncio.ensure_future(repeat()), asyncio.ensure_future(started.wait())
    try:
        await asyncio.wait({task, start}, return_when=asyncio.FIRST_COMPLETED)
        if not started.is_set():
            await task
        yield
        if task.done():
            raise StreamBroken(f"the other model's work ended: {task.exception()}")
    finally:
        start.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError, ClientError):
            await task


def phase_figures(phase: Phase, plan: Plan) -> Figures | None:
    """The figures of a phase; None if it was not run."""
    return figures(phase.run, plan.slo) if phase.run else None


def to_objects(phases: list[Phase], plan: Plan) -> list[dict[str, Any]]:
    """The phases for JSON, each with its ratios to the first."""
    alone = phase_figures(phases[0], plan)
    return [
        {
            "phase": phase.name,
            "problem": phase.problem,
            "figures": phase_figures(phase, plan),
            "ratios": ratios(phase_figures(phase, plan), alone),
        }
        for phase in phases
    ]


def to_rows(objects: list[dict[str, Any]]) -> list[Figures]:
    """The objects of to_objects() for CSV: one flat row per phase."""
    return [
        {"phase": one["phase"], "problem": one["problem"]}
        | (one["figures"] or {})
        | {f"{name}_ratio": ratio for name, ratio in one["ratios"].items()}
        for one in objects
    ]


MEASURES = {
    "TTFT p50 ms": "ttft_p50_ms",
    "inter-token p50 ms": "gap_p50_ms",
    "inter-token p99 ms": "gap_p99_ms",
    "tokens/s": "tokens_per_second",
}


def ratios(level: Figures | None, alone: Figures | None) -> dict[str, float | None]:
    """The ratio of each measure to that of the model alone."""
    return {name: _ratio(level, alone, name) for name in MEASURES.values()}


def _ratio(level: Figures | None, alone: Figures | None, name: str) -> float | None:
    value, reference = (figures[name] if figures else None for figures in (level, alone))
    return value / reference if value is not None and reference else None
