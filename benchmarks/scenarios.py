"""Scenarios of a measurement over HTTP: each puts load on one running server and returns its figures.

Rule 1: a scenario sends every server the same requests in the same order.
Rule 2: a scenario is run once, shorter, before it is measured first: compilation is not part of a figure. Later rounds
        have one request before them, which brings a server that was stopped back to speed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

from benchmarks.embeddings import embed_all, make_texts
from benchmarks.load import Target, run_load, run_one
from benchmarks.servers import EMBEDDING, FIRST, GGUF, MLX_LM, OURS, SECOND
from benchmarks.settings import GREEDY, SAMPLED, Mode, Sizes
from benchmarks.stats import percentile, summarise, usage
from benchmarks.vocabulary import Prompts
from mlxserver.client.api import Message
from mlxserver.client.bench.load import Sample, read, send, without_collector
from mlxserver.client.recorder import PreparedRequest
from mlxserver.client.stats import Timing
from mlxserver.engine.loading import sources

Figures = dict[str, float]
FOLLOW_UP_TOKENS = 20
TOKENS_PER_PREFILL = 8  # of the stream, at least, during one long prefill
SESSION_ANSWER = 16
TEXTS_PER_REQUEST = 8
EMBEDDING_CLIENTS = 16
ENDLESS = {**GREEDY, "ignore_eos": True}  # for the GGUF file, whose tokenizer is its own


@dataclass(frozen=True, slots=True)
class Bench:
    """Server to measure, the names of its models by role, prompts, and how much to do. first: in the first round."""

    target: Target
    models: Mapping[str, str]
    prompts: Prompts
    sizes: Sizes
    port: int
    first: bool = True

    def question(self, tokens: int) -> Message:
        """A user message unlike any before it."""
        return {"role": "user", "content": self.prompts.make(tokens)}

    def request(
        self, model: str, prompt_tokens: int, max_tokens: int, mode: Mode = "greedy", seed: int = 0
    ) -> PreparedRequest:
        """A request with a prompt of its own; `seed` counts in mode seeded."""
        sampling = {"greedy": GREEDY, "sampled": SAMPLED, "seeded": {**SAMPLED, "seed": seed}}[mode]
        sampling = ENDLESS if model == self.models.get(GGUF) else sampling
        return self.target.prepare(model, [self.question(prompt_tokens)], max_tokens, sampling)

    def requests(self, mode: Mode, count: int, max_tokens: int, role: str = FIRST) -> list[PreparedRequest]:
        """Requests to the model of a role."""
        model, length = self.models[role], self.sizes.prompt_tokens
        return [self.request(model, length, max_tokens, mode, seed) for seed in range(count)]


async def _warm_up(bench: Bench, mode: Mode, clients: int, role: str = FIRST) -> None:
    clients = clients if bench.first else 1
    await run_load(bench.requests(mode, clients, bench.sizes.warmup_tokens, role), clients)


async def measure_load(bench: Bench, mode: Mode, clients: int, role: str = FIRST) -> Figures:
    """A closed loop on one model."""
    # mlx_lm.server serves seeded requests one by one: there is no batch shape to warm up.
    await _warm_up(bench, mode, 1 if mode == "seeded" else clients, role)
    sizes = bench.sizes
    each = sizes.seeded_requests_per_client if mode == "seeded" else sizes.requests_per_client
    requests = bench.requests(mode, clients * each, sizes.max_tokens, role)
    return summarise(await run_load(requests, clients)).figures()


async def measure_two_models(bench: Bench) -> Figures:
    """A closed loop whose requests alternate between two models."""
    sizes = bench.sizes
    pair = [bench.models[FIRST], bench.models[SECOND]]
    for model in pair:
        await run_one(bench.request(model, sizes.prompt_tokens, sizes.warmup_tokens, "sampled"))
    models = [pair[number % 2] for number in range(sizes.pair_clients * sizes.requests_per_client)]
    requests = [bench.request(model, sizes.prompt_tokens, sizes.max_tokens, "sampled") for model in models]
    return summarise(await run_load(requests, sizes.pair_clients)).figures()


async def measure_second_turn(bench: Bench) -> Figures:
    """TTFT of the first and the second turn of long conversations, one at a time; medians."""
    if bench.first:
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
        return await run_one(bench.target.prepare(bench.models[FIRST], messages, bench.sizes.max_tokens, GREEDY))

    opening = bench.question(bench.sizes.conversation_tokens)
    first = await ask([opening])
    first_turn = require(first)
    answer = {"role": "assistant", "content": first.text}
    return first_turn, require(await ask([opening, answer, bench.question(FOLLOW_UP_TOKENS)]))


async def measure_long_prefill(bench: Bench) -> Figures:
    """The gaps of a stream of the first model, alone and during long prefills of the second model."""
    sizes, model, other = bench.sizes, bench.models[FIRST], bench.models[SECOND]
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
    sizes = bench.sizes
    long = [bench.question(sizes.long_tokens)]
    await _warm_up(bench, "greedy", sizes.few)
    alone = await _few(bench)
    # The second request has its prompt from the prefix cache, and decodes at once.
    await run_one(bench.target.prepare(bench.models[FIRST], long, 1, GREEDY))
    stream = bench.target.prepare(bench.models[FIRST], long, sizes.long_answer, GREEDY)
    streaming, beside = asyncio.create_task(send(stream)), list[Timing]()
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


async def measure_session(bench: Bench) -> Figures:
    """TTFT of the turns of an agent whose prompt grows behind a long system message, and of a prompt of that length.

    turn_ttft: median from the second turn on. seconds: of all turns together.
    """
    sizes, half = bench.sizes, bench.sizes.session_tokens // 2
    messages: list[Message] = [{"role": "system", "content": bench.prompts.make(half)}]
    turns, begun = [], perf_counter()
    for _ in range(sizes.session_turns):
        messages.append(bench.question(max(8, half // sizes.session_turns - SESSION_ANSWER)))
        turn = await run_one(bench.target.prepare(bench.models[FIRST], messages, SESSION_ANSWER, GREEDY))
        messages.append({"role": "assistant", "content": turn.text})
        turns.append(require(turn))
    seconds = perf_counter() - begun
    cold = require(await run_one(bench.request(bench.models[FIRST], sizes.session_tokens, SESSION_ANSWER)))
    return {
        "turn_ttft": percentile([turn.ttft for turn in turns[1:]], 50),
        "last_ttft": percentile([turns[-1].ttft], 50),
        "cold_ttft": percentile([cold.ttft], 50),
        "seconds": seconds,
        "prompt_tokens": usage(turns[-1]).prompt_tokens,
        "cached_tokens": usage(turns[-1]).cached_tokens,
    }


async def measure_embeddings(bench: Bench) -> Figures:
    """Tokens/s of texts of many lengths from many clients, some in each request."""
    texts, _ = make_texts(sources.resolve("embedded:minilm"), bench.sizes.texts)
    model = bench.models[EMBEDDING]
    if bench.first:
        await asyncio.to_thread(embed_all, bench.port, texts, EMBEDDING_CLIENTS, TEXTS_PER_REQUEST, model)
    seconds, tokens = await asyncio.to_thread(embed_all, bench.port, texts, EMBEDDING_CLIENTS, TEXTS_PER_REQUEST, model)
    return {"tokens_per_second": tokens / seconds}


def require(sample: Sample) -> Timing:
    """The timing of a request that a figure needs. Raises RuntimeError if it failed or gave no text."""
    if sample.timing is None or not sample.timing.arrivals:
        raise RuntimeError(f"A request failed: {sample.error or 'no text came'}")
    return sample.timing


@dataclass(frozen=True, slots=True)
class Scenario:
    """Scenario of a measurement. roles: of the models that it takes. servers: that it is for; None for all.

    full: whether it is left out unless everything is asked for.
    """

    run: Callable[[Bench], Coroutine[Any, Any, Figures]]
    roles: tuple[str, ...] = (FIRST,)
    servers: tuple[str, ...] | None = None
    full: bool = False

    def takes(self, server: str, roles: Collection[str]) -> bool:
        """Whether a server takes part that has models of these roles."""
        return (self.servers is None or server in self.servers) and set(self.roles) <= set(roles)


def scenarios(sizes: Sizes) -> dict[str, Scenario]:
    """All scenarios by name, in the order of measuring."""
    both, peak = (OURS, MLX_LM), sizes.peak

    def load(mode: Mode, clients: int, *, full: bool, servers: tuple[str, ...] | None = both) -> Scenario:
        return Scenario(lambda bench: measure_load(bench, mode, clients), servers=servers, full=full)

    def gguf(clients: int) -> Scenario:
        return Scenario(lambda bench: measure_load(bench, "greedy", clients, GGUF), (GGUF,))

    ends = {
        f"sampled c={n}": load("sampled", n, full=False, servers=None) for n in sorted({sizes.concurrency[0], peak})
    }
    return {
        **ends,
        **{f"gguf c={n}": gguf(n) for n in sizes.concurrency},
        "agent session": Scenario(measure_session, servers=both),
        "short beside long": Scenario(measure_short_beside_long, servers=both),
        "embeddings": Scenario(measure_embeddings, (EMBEDDING,)),
        **{f"sampled c={n}": load("sampled", n, full=True) for n in sizes.concurrency if f"sampled c={n}" not in ends},
        **{f"greedy c={n}": load("greedy", n, full=True) for n in sizes.concurrency},
        f"seeded c={peak}": load("seeded", peak, full=True),
        "two models": Scenario(measure_two_models, (FIRST, SECOND), both, full=True),
        "second turn": Scenario(measure_second_turn, servers=both, full=True),
        "long prefill": Scenario(measure_long_prefill, (FIRST, SECOND), both, full=True),
    }
