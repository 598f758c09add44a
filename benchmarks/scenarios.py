"""What is measured over HTTP: each scenario drives one running server and returns its figures.

Rule 1: a scenario does to every server the same, in the same order, with the same prompts.
Rule 2: what a scenario does is done once, shorter, before it is measured: compilation is not part of a figure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

from benchmarks.load import Job, LoadGenerator
from benchmarks.settings import GREEDY, SAMPLED, Mode, Sizes
from benchmarks.stats import Record, percentile, summarise
from benchmarks.vocabulary import Prompts

Figures = dict[str, float]
FOLLOW_UP_TOKENS = 20
_TOKENS_PER_READING = 8  # of the stream, at least, while a long prompt is read


@dataclass(frozen=True, slots=True)
class Bench:
    """A server to measure: its load generator, the names of its two models, prompts, and how much to do."""

    generator: LoadGenerator
    models: tuple[str, ...]
    prompts: Prompts
    sizes: Sizes

    def job(self, model: str, prompt_tokens: int, max_tokens: int, mode: Mode = "greedy", seed: int = 0) -> Job:
        """A request with a prompt of its own; `seed` counts in mode seeded."""
        sampling = {"greedy": GREEDY, "sampled": SAMPLED, "seeded": {**SAMPLED, "seed": seed}}[mode]
        messages = [{"role": "user", "content": self.prompts.make(prompt_tokens)}]
        return Job(model, messages, max_tokens, sampling)

    def jobs(self, mode: Mode, count: int, max_tokens: int) -> list[Job]:
        """Requests to the first model."""
        model, length = self.models[0], self.sizes.prompt_tokens
        return [self.job(model, length, max_tokens, mode, seed) for seed in range(count)]


async def _warm_up(bench: Bench, mode: Mode, clients: int) -> None:
    await bench.generator.run(bench.jobs(mode, clients, bench.sizes.warmup_tokens), clients)


async def measure_load(bench: Bench, mode: Mode, clients: int, rounds: int) -> Figures:
    """A closed loop on one model."""
    # mlx_lm.server serves seeded requests one by one: there is no batch shape to warm up.
    await _warm_up(bench, mode, 1 if mode == "seeded" else clients)
    jobs = bench.jobs(mode, clients * rounds, bench.sizes.max_tokens)
    return summarise(await bench.generator.run(jobs, clients)).figures()


async def measure_two_models(bench: Bench) -> Figures:
    """A closed loop whose requests alternate between two models."""
    sizes = bench.sizes
    for model in bench.models:
        await bench.generator.send(bench.job(model, sizes.prompt_tokens, sizes.warmup_tokens, "sampled"))
    count = sizes.pair_clients * sizes.rounds
    models = [bench.models[number % 2] for number in range(count)]
    jobs = [bench.job(model, sizes.prompt_tokens, sizes.max_tokens, "sampled") for model in models]
    return summarise(await bench.generator.run(jobs, sizes.pair_clients)).figures()


async def measure_second_turn(bench: Bench) -> Figures:
    """TTFT of the first and the second turn of long conversations, one at a time; medians."""
    await _converse(bench)
    turns = [await _converse(bench) for _ in range(bench.sizes.conversations)]
    first = percentile([turn.ttft for turn, _ in turns], 50)
    second = percentile([turn.ttft for _, turn in turns], 50)
    cached = sum(turn.cached_tokens for _, turn in turns)
    prompts = sum(turn.prompt_tokens for _, turn in turns)
    return {
        "first_ttft": first,
        "second_ttft": second,
        "second_over_first": second / first,
        "cached_tokens": cached,
        "prompt_tokens": prompts,
    }


async def _converse(bench: Bench) -> tuple[Record, Record]:
    opening = bench.job(bench.models[0], bench.sizes.conversation_tokens, bench.sizes.max_tokens)
    first = require(await bench.generator.send(opening))
    answer = {"role": "assistant", "content": first.text}
    question = {"role": "user", "content": bench.prompts.make(FOLLOW_UP_TOKENS)}
    second = await bench.generator.send(replace(opening, messages=[*opening.messages, answer, question]))
    return first, require(second)


async def measure_long_prefill(bench: Bench) -> Figures:
    """The gaps of a stream of the first model, alone and while the second model reads long prompts."""
    sizes = bench.sizes
    stream, reader = bench.models[:2]
    prefill = bench.job(reader, sizes.prefill_tokens, 1)
    await bench.generator.send(prefill)
    await bench.generator.send(bench.job(stream, sizes.prompt_tokens, sizes.warmup_tokens))
    alone = require(await bench.generator.send(bench.job(stream, sizes.prompt_tokens, sizes.stream_tokens)))
    beside, readings = await _stream_beside_readings(bench, stream, reader)
    gaps = [b - a for a, b in pairwise(beside.arrivals) if any(r.sent < b and a < r.ended for r in readings)]
    return {
        "alone_gap_p50": percentile(alone.gaps, 50),
        "alone_gap_p99": percentile(alone.gaps, 99),
        "beside_gap_p50": percentile(gaps, 50),
        "beside_gap_p99": percentile(gaps, 99),
        "beside_over_alone": percentile(gaps, 99) / percentile(alone.gaps, 99),
        "gaps": len(gaps),
        "prefill_ttft": percentile([reading.ttft for reading in readings], 50),
        "prefills": len(readings),
    }


async def _stream_beside_readings(bench: Bench, stream: str, reader: str) -> tuple[Record, list[Record]]:
    """Long prompts to `reader`, one after the other, for as long as `stream` answers."""
    sizes = bench.sizes
    # Made before: making one takes as long as some of the gaps, and whoever does it notes no arrival meanwhile.
    jobs = [bench.job(reader, sizes.prefill_tokens, 1) for _ in range(sizes.stream_tokens // _TOKENS_PER_READING)]
    streaming = asyncio.create_task(bench.generator.send(bench.job(stream, sizes.prompt_tokens, sizes.stream_tokens)))
    readings: list[Record] = []
    while jobs and not streaming.done():
        readings.append(require(await bench.generator.send(jobs.pop())))
    return require(await streaming), readings


def require(record: Record) -> Record:
    """The record of a request that a figure can't do without. Raises RuntimeError if it failed or gave no text."""
    if record.error or not record.arrivals:
        raise RuntimeError(f"A request failed: {record.error or 'no text came'}")
    return record


Scenario = Callable[[Bench], Coroutine[Any, Any, Figures]]


def scenarios(sizes: Sizes) -> dict[str, Scenario]:
    """All of them by name, in the order of measuring."""

    def load(mode: Mode, clients: int, rounds: int) -> Scenario:
        return lambda bench: measure_load(bench, mode, clients, rounds)

    loads = {
        f"{mode} c={clients}": load(mode, clients, sizes.rounds)
        for mode in ("greedy", "sampled")
        for clients in sizes.concurrency
    }
    return {
        **loads,
        f"seeded c={sizes.peak}": load("seeded", sizes.peak, sizes.seeded_rounds),
        "second turn": measure_second_turn,
        "long prefill": measure_long_prefill,
        "two models": measure_two_models,
    }


async def measure(
    bench: Bench, chosen: Mapping[str, Scenario], results: dict[str, Figures], tell: Callable[[str], None]
) -> None:
    """Run the chosen scenarios and put their figures into results; one that fails is left out. `tell` gets a line."""
    for name, scenario in chosen.items():
        begun = perf_counter()
        try:
            results[name] = await scenario(bench)
        except (RuntimeError, ValueError) as error:
            tell(f"{name} failed: {error}")
            continue
        errors = results[name].get("errors", 0)
        tell(f"{name}: {perf_counter() - begun:.0f} s" + (f", {errors:.0f} requests failed" if errors else ""))
