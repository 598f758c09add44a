"""Scenarios of a measurement over HTTP: each puts load on one running server and returns its figures.

Rule 1: a scenario sends every server the same requests in the same order.
Rule 2: a scenario is run once, shorter, before it is measured: compilation is not part of a figure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

from benchmarks.load import Target, run_load, run_one
from benchmarks.settings import GREEDY, SAMPLED, Mode, Sizes
from benchmarks.stats import percentile, summarise, usage
from benchmarks.vocabulary import Prompts
from mlxserver.client.api import Message
from mlxserver.client.bench.load import Sample, read, send, without_collector
from mlxserver.client.recorder import PreparedRequest
from mlxserver.client.stats import Timing

Figures = dict[str, float]
FOLLOW_UP_TOKENS = 20
TOKENS_PER_PREFILL = 8  # of the stream, at least, during one long prefill


@dataclass(frozen=True, slots=True)
class Bench:
    """Server to measure, the names of its two models, prompts, and how much to do."""

    target: Target
    models: tuple[str, ...]
    prompts: Prompts
    sizes: Sizes

    def question(self, tokens: int) -> Message:
        """A user message unlike any before it."""
        return {"role": "user", "content": self.prompts.make(tokens)}

    def request(
        self, model: str, prompt_tokens: int, max_tokens: int, mode: Mode = "greedy", seed: int = 0
    ) -> PreparedRequest:
        """A request with a prompt of its own; `seed` counts in mode seeded."""
        sampling = {"greedy": GREEDY, "sampled": SAMPLED, "seeded": {**SAMPLED, "seed": seed}}[mode]
        return self.target.prepare(model, [self.question(prompt_tokens)], max_tokens, sampling)

    def requests(self, mode: Mode, count: int, max_tokens: int) -> list[PreparedRequest]:
        """Requests to the first model."""
        model, length = self.models[0], self.sizes.prompt_tokens
        return [self.request(model, length, max_tokens, mode, seed) for seed in range(count)]


async def _warm_up(bench: Bench, mode: Mode, clients: int) -> None:
    await run_load(bench.requests(mode, clients, bench.sizes.warmup_tokens), clients)


async def measure_load(bench: Bench, mode: Mode, clients: int, rounds: int) -> Figures:
    """A closed loop on one model."""
    # mlx_lm.server serves seeded requests one by one: there is no batch shape to warm up.
    await _warm_up(bench, mode, 1 if mode == "seeded" else clients)
    requests = bench.requests(mode, clients * rounds, bench.sizes.max_tokens)
    return summarise(await run_load(requests, clients)).figures()


async def measure_two_models(bench: Bench) -> Figures:
    """A closed loop whose requests alternate between two models."""
    sizes = bench.sizes
    for model in bench.models:
        await run_one(bench.request(model, sizes.prompt_tokens, sizes.warmup_tokens, "sampled"))
    count = sizes.pair_clients * sizes.rounds
    models = [bench.models[number % 2] for number in range(count)]
    requests = [bench.request(model, sizes.prompt_tokens, sizes.max_tokens, "sampled") for model in models]
    return summarise(await run_load(requests, sizes.pair_clients)).figures()


async def measure_second_turn(bench: Bench) -> Figures:
    """TTFT of the first and the second turn of long conversations, one at a time; medians."""
    await _converse(bench)
    turns = [await _converse(bench) for _ in range(bench.sizes.conversations)]
    first = percentile([turn.ttft for turn, _ in turns], 50)
    second = percentile([turn.ttft for _, turn in turns], 50)
    return {
        "first_ttft": first,
        "second_ttft": second,
        "second_over_first": second / first,
        "cached_tokens": sum(usage(turn).cached_tokens for _, turn in turns),
        "prompt_tokens": sum(usage(turn).prompt_tokens for _, turn in turns),
    }


async def _converse(bench: Bench) -> tuple[Timing, Timing]:
    async def ask(messages: Sequence[Message]) -> Sample:
        return await run_one(bench.target.prepare(bench.models[0], messages, bench.sizes.max_tokens, GREEDY))

    opening = bench.question(bench.sizes.conversation_tokens)
    first = await ask([opening])
    first_turn = require(first)
    answer = {"role": "assistant", "content": first.text}
    return first_turn, require(await ask([opening, answer, bench.question(FOLLOW_UP_TOKENS)]))


async def measure_long_prefill(bench: Bench) -> Figures:
    """The gaps of a stream of the first model, alone and during long prefills of the second model."""
    sizes, (model, other) = bench.sizes, bench.models[:2]
    await run_one(bench.request(other, sizes.prefill_tokens, 1))
    await run_one(bench.request(model, sizes.prompt_tokens, sizes.warmup_tokens))
    alone = require(await run_one(bench.request(model, sizes.prompt_tokens, sizes.stream_tokens)))
    beside, prefills = await _stream_beside_prefills(bench, model, other)
    gaps = [b - a for a, b in pairwise(beside.arrivals) if any(p.start < b and a < p.end for p in prefills)]
    return {
        "alone_gap_p50": percentile(alone.gaps, 50),
        "alone_gap_p99": percentile(alone.gaps, 99),
        "beside_gap_p50": percentile(gaps, 50),
        "beside_gap_p99": percentile(gaps, 99),
        "beside_over_alone": percentile(gaps, 99) / percentile(alone.gaps, 99),
        "gaps": len(gaps),
        "prefill_ttft": percentile([prefill.ttft for prefill in prefills], 50),
        "prefills": len(prefills),
    }


async def _stream_beside_prefills(bench: Bench, model: str, other: str) -> tuple[Timing, list[Timing]]:
    """One stream of `model`, and long prompts to `other`, one after the other, for as long as the stream lasts."""
    sizes = bench.sizes
    # Prepared before the stream starts: preparing one takes as long as some of the gaps, and no arrival is recorded
    # meanwhile. For the same reason what the requests gave is parsed after the stream has ended.
    waiting = [bench.request(other, sizes.prefill_tokens, 1) for _ in range(sizes.stream_tokens // TOKENS_PER_PREFILL)]
    stream = bench.request(model, sizes.prompt_tokens, sizes.stream_tokens)
    outcomes = []
    with without_collector():
        streaming = asyncio.create_task(send(stream))
        while waiting and not streaming.done():
            outcomes.append(await send(waiting.pop()))
        streamed = await streaming
    return require(read(streamed)), [require(read(outcome)) for outcome in outcomes]


async def measure_short_beside_long(bench: Bench) -> Figures:
    """TTFT and gaps of short requests that come together, alone and while a long conversation decodes; medians."""
    sizes, model = bench.sizes, bench.models[0]
    long = bench.request(model, sizes.long_tokens, sizes.long_answer)
    await _warm_up(bench, "greedy", sizes.few)
    alone = [timing for _ in range(sizes.rounds) for timing in await _few(bench)]
    await run_one(bench.request(model, sizes.long_tokens, 1))
    streaming, beside = asyncio.create_task(send(long)), []
    while not streaming.done():
        beside += await _few(bench)
    decoding = require(read(await streaming)).arrivals
    beside = [timing for timing in beside if decoding[0] < timing.start and timing.arrivals[-1] < decoding[-1]]
    figures = {"requests": float(len(beside))}
    for name, timings in (("alone", alone), ("beside", beside)):
        figures[f"{name}_ttft_p50"] = percentile([timing.ttft for timing in timings], 50)
        figures[f"{name}_gap_p50"] = percentile([gap for timing in timings for gap in timing.gaps], 50)
    for name in ("ttft", "gap"):
        figures[f"{name}_beside_over_alone"] = figures[f"beside_{name}_p50"] / figures[f"alone_{name}_p50"]
    return figures


async def _few(bench: Bench) -> list[Timing]:
    """Short requests of a few clients, all at once."""
    few = bench.sizes.few
    return [require(sample) for sample in await run_load(bench.requests("greedy", few, bench.sizes.max_tokens), few)]


def require(sample: Sample) -> Timing:
    """The timing of a request that a figure needs. Raises RuntimeError if it failed or gave no text."""
    if sample.timing is None or not sample.timing.arrivals:
        raise RuntimeError(f"A request failed: {sample.error or 'no text came'}")
    return sample.timing


Scenario = Callable[[Bench], Coroutine[Any, Any, Figures]]


def scenarios(sizes: Sizes) -> dict[str, Scenario]:
    """All scenarios by name, in the order of measuring."""

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
        "short beside long": measure_short_beside_long,
    }


async def measure(
    bench: Bench, chosen: Mapping[str, Scenario], results: dict[str, Figures], report: Callable[[str], None]
) -> None:
    """Run the chosen scenarios and put their figures into results; one that fails is left out.

    report: called with a line of progress after each.
    """
    for name, scenario in chosen.items():
        begun = perf_counter()
        try:
            results[name] = await scenario(bench)
        except (RuntimeError, ValueError) as error:
            report(f"{name} failed: {error}")
            continue
        errors = results[name].get("errors", 0)
        report(f"{name}: {perf_counter() - begun:.0f} s" + (f", {errors:.0f} requests failed" if errors else ""))
