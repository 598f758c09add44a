"""Soak test: random loads, unloads, evictions, requests and hang-ups on a server with little memory for eight models.

Its budget is what one model would take with its whole KV cache reserved. Three fit at once, and the others after
evictions; long prompts make them compete for KV cache. Three of the eight are a vision model, an embedding model and a
reranker.

Run: python -m tools.soak [--minutes 10] [--seed 0]. Exit status 1 if a promise was broken:

Promise 1: every accepted request is answered whole, or with an error object.
Promise 2: no model is stalled: at the end each one is unloaded and has no request.
Promise 3: the memory returns to its size at the start, within 5 %.
Promise 4: three models are loaded at once, of one kind and of several; at every sample what is held, and live arrays,
        are within the budget.

It prints one line per part: the requests that were answered, refused and hung up on, the median, the 99th percentile
and the maximum of the latencies in seconds, and the memory without models; at the end the counts of all outcomes.
Ctrl-C or SIGTERM ends it early: it prints what it has so far, and its exit status is 130.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import aiohttp

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import estimate
from tools.harness.encoder_models import tiny_cross_encoder, tiny_embedder
from tools.harness.models import tiny_llama
from tools.harness.running_server import running_server
from tools.harness.vision_models import picture, tiny_vision

KEYS = ("a", "b", "c", "d", "e")
SEEING, VECTORS, RERANKER = "seeing", "vectors", "reranker"
ALL_KEYS = (*KEYS, SEEING, VECTORS, RERANKER)
TOGETHER = ((SEEING, VECTORS, RERANKER), KEYS[:3], (VECTORS, RERANKER, KEYS[0]))  # models that are loaded at once
PICTURES = 4  # that clients send
TEXTS = 24  # of a request, at most
CONTEXT, MIN_CONTEXT = 61_440, 512  # tokens
LONG = 200  # words of a long prompt
SAMPLE = 0.1  # seconds between two samples of the memory
WORKERS = 12
PART = 5.0  # minutes between two measurements without models; a short run has five parts
# Statuses with which a request may end, other than 200.
ERRORS = {409, 429, 503, 507}
STOPPED = 130  # the exit status of a run that was ended early


class Broken(Exception):
    """A promise was not kept."""


class Tally:
    """Outcomes of requests. times: latencies of whole answers in seconds."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.times: list[float] = []

    def __str__(self) -> str:
        ordered = sorted(self.times) or [0.0]
        median, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
        left = self.outcomes["hang-up"]
        errors = sum(count for outcome, count in self.outcomes.items() if not outcome.endswith("200")) - left
        times = f"p50 {median:.2f} p99 {p99:.2f} longest {ordered[-1]:.2f}"
        return f"{len(self.times)} answers, {errors} errors, {left} hang-ups, {times}"

    def add(self, other: Tally) -> None:
        """Add the counts and times of another tally."""
        self.outcomes.update(other.outcomes)
        self.times += other.times


class Soak:
    """Clients of one run."""

    def __init__(self, session: aiohttp.ClientSession, url: str, sources: dict[str, str], seed: int) -> None:
        self._session = session
        self._url = url
        self._sources = sources
        self._random = random.Random(seed)
        self.tally = Tally()
        self.samples = 0
        self.most = Counter[str]()  # bytes

    async def load_together(self) -> None:
        """Load three models at once, of one kind and of several. Raises Broken if they do not all stay."""
        for keys in TOGETHER:
            for key in keys:
                await self.load(key)
            async with self._session.get(f"{self._url}/v1/models") as response:
                models = (await response.json())["data"]
            loaded = {model["id"] for model in models if model["status"]["value"] == "loaded"}
            if not loaded.issuperset(keys):
                raise Broken(f"only {loaded} of {keys} are loaded at once")

    async def watch(self) -> None:
        """Sample the memory until cancelled. Raises Broken for a sample beyond the budget."""
        while True:
            figures = await self.figures()
            self.most["held"] = max(self.most["held"], held := int(_held(figures)))
            self.most["live"] = max(self.most["live"], live := int(figures["memory_active_bytes"]))
            self.samples += 1
            if max(held, live) > figures["memory_budget_bytes"]:
                raise Broken(f"memory beyond the budget: {figures}")
            await asyncio.sleep(SAMPLE)

    async def work(self, until: float) -> None:
        """Run one client until a time of time.monotonic()."""
        actions = (self.chat, self.stream, self.hang_up, self.embed, self.rerank, self.load, self.unload)
        while time.monotonic() < until:
            act = self._random.choices(actions, weights=(6, 6, 4, 3, 3, 1, 2))[0]
            if act in (self.embed, self.rerank):
                await act(VECTORS if act == self.embed else RERANKER)
            else:
                await act(self._random.choice(ALL_KEYS if act in (self.load, self.unload) else (*KEYS, SEEING)))

    async def chat(self, key: str) -> None:
        """Request an answer without streaming."""
        started = time.monotonic()
        async with self._ask(key) as response:
            content = await response.json()
            if response.status == 200 and content["choices"][0]["finish_reason"] not in ("stop", "length"):
                raise Broken(f"an answer without an end: {content}")
            self._note("chat" if key != SEEING else "chat with a picture", response.status, content)
            if response.status == 200:
                self.tally.times.append(time.monotonic() - started)

    async def stream(self, key: str) -> None:
        """Request a stream and read it to its end."""
        started = time.monotonic()
        async with self._ask(key, stream=True) as response:
            text = (await response.read()).decode()
            events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
            if response.status != 200:
                self._note("stream", response.status, json.loads(text))
            elif events[-1:] == ["[DONE]"]:
                self._note("stream", 200, {})
                self.tally.times.append(time.monotonic() - started)
            elif events and "error" in json.loads(events[-1]):
                self.tally.outcomes[f"stream 200, then {json.loads(events[-1])['error']['code']}"] += 1
            else:
                raise Broken(f"a stream without an end: {events[-1:]}")

    async def embed(self, key: str) -> None:
        """Request vectors of some texts."""
        texts = self._texts()
        status, content = await self._post("/v1/embeddings", {"model": key, "input": texts})
        if status == 200 and [each["index"] for each in content["data"]] != [*range(len(texts))]:
            raise Broken(f"vectors are missing: {content}")
        self._note("embed", status, content)

    async def rerank(self, key: str) -> None:
        """Request scores of some documents."""
        documents = self._texts()
        status, content = await self._post("/v1/rerank", {"model": key, "query": "the cat", "documents": documents})
        if status == 200 and {each["index"] for each in content["results"]} != {*range(len(documents))}:
            raise Broken(f"scores are missing: {content}")
        self._note("rerank", status, content)

    def _texts(self) -> list[str]:
        return ["dog " * self._random.randrange(1, 80) for _ in range(self._random.randrange(1, TEXTS))]

    async def hang_up(self, key: str) -> None:
        """Request a stream and hang up before the answer, or during it."""
        seconds = self._random.choice((0.01, 0.05, 0.3))
        try:
            async with asyncio.timeout(seconds), self._ask(key, stream=True, max_tokens=500) as response:
                await response.read()
        except TimeoutError:
            self.tally.outcomes["hang-up"] += 1

    async def load(self, key: str) -> None:
        """Load a model without sending a request to it."""
        source = await self._post("/v1/models/load", {"model": self._sources[key], "key": key})
        self._note("load", *source)

    async def unload(self, key: str) -> None:
        """Unload a model in a random mode."""
        mode = self._random.choice(("drain", "abort", "reject"))
        body: dict[str, Any] = {"key": key, "mode": mode}
        if mode == "drain" and self._random.random() < 0.5:
            body["timeout"] = 0.2
        self._note(f"unload {mode}", *await self._post("/v1/models/unload", body))

    async def settle(self) -> int:
        """Unload all models and check that none is stalled; the memory of the process in bytes. Raises Broken."""
        for key in ALL_KEYS:
            await self._post("/v1/models/unload", {"key": key, "mode": "drain"})
        async with self._session.get(f"{self._url}/v1/models") as response:
            for model in (await response.json())["data"]:
                state = model["status"]["value"], model["running_requests"], model["queued_requests"]
                if state != ("unloaded", 0, 0) or model["reserved_bytes"]:
                    raise Broken(f"{model['id']} is stalled: {model}")
        figures = await self.figures()
        return int(figures["process_bytes"])

    async def figures(self) -> dict[str, float]:
        """The figures of /metrics, summed over models."""
        async with self._session.get(f"{self._url}/metrics") as response:
            lines = re.findall(r"^mlx_server_(\w+?)(?:\{(.*?)\})? (\S+)$", await response.text(), re.MULTILINE)
        sums: defaultdict[str, float] = defaultdict(float)
        for name, labels, value in lines:
            kind = re.search(r'(?:outcome|reason)="(\w+)"', labels)
            sums[f"{name} {kind[1]}" if kind else name] += float(value)
        return dict(sums)

    def _ask(self, key: str, *, stream: bool = False, max_tokens: int = 40) -> Any:
        words = LONG if self._random.random() < 0.1 else 120
        content: Any = " ".join(["word"] * self._random.randrange(1, words))
        if key == SEEING:
            content = [_picture(self._random.randrange(PICTURES)), {"type": "text", "text": content}]
        body = {
            "model": key,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._random.randrange(1, max_tokens),
            "stream": stream,
        }
        return self._session.post(f"{self._url}/v1/chat/completions", json=body)

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        async with self._session.post(self._url + path, json=body) as response:
            return response.status, await response.json()

    def _note(self, action: str, status: int, content: Any) -> None:
        """Count an outcome. Raises Broken for one that is neither an answer nor an error object."""
        if status != 200 and (status not in ERRORS or not content.get("error", {}).get("message")):
            raise Broken(f"{action}: {status} {content}")
        code = "" if status == 200 else f" {content['error']['code']}"
        self.tally.outcomes[f"{action} {status}{code}"] += 1


def _picture(seed: int) -> dict[str, Any]:
    """A part of a message."""
    file = io.BytesIO()
    picture(seed, 48 + 16 * seed, 32).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _held(figures: dict[str, float]) -> float:
    """Bytes that models and prefixes hold."""
    return figures["memory_reserved_bytes"] + figures["memory_prefix_bytes"]


async def soak(url: str, sources: dict[str, str], arguments: argparse.Namespace) -> bool:
    """Run all parts and print the figures; whether every promise was kept. Raises CancelledError if stopped."""
    this_task = asyncio.current_task()
    assert this_task
    for stop in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stop, this_task.cancel)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = Soak(session, url, sources, arguments.seed)
        # What the process allocates once, in its first steps, is not a leak.
        await clients.load_together()
        await run(clients, min(60.0, arguments.minutes * 20))
        before = await clients.settle()
        print(f"start: {before / 2**20:.1f} MiB", flush=True)
        after = await run_parts(clients, arguments.minutes)
        figures = await clients.figures()
        for name in ("loads_total loaded", "loads_total aborted", "unloads_total evict", "completion_tokens_total"):
            print(f"{figures.get(name, 0):>7.0f}  {name}")
        print(f"memory at the start {before / 2**20:.1f} MiB, at the end {after / 2**20:.1f} MiB: {after / before:.3f}")
        return after <= before * float(arguments.growth)


async def run_parts(clients: Soak, minutes: float) -> int:
    """Run part after part and print a line for each, and one for all, however they end; the memory after the last."""
    parts = max(5, round(minutes / PART))
    total, bytes = Tally(), 0
    try:
        for part in range(1, parts + 1):
            clients.tally = Tally()
            try:
                await run(clients, minutes * 60 / parts)
            finally:
                total.add(clients.tally)
            bytes = await clients.settle()
            print(f"part {part}/{parts}: {clients.tally}, {bytes / 2**20:.1f} MiB", flush=True)
    finally:
        print(f"all: {total}")
        held, live = clients.most["held"] / 2**20, clients.most["live"] / 2**20
        print(f"at most {held:.1f} MiB held, {live:.1f} MiB in live arrays, in {clients.samples} samples")
        for outcome, count in sorted(total.outcomes.items()):
            print(f"{count:>7}  {outcome}")
    return bytes


async def run(clients: Soak, seconds: float) -> None:
    """Run all clients at once, and sample the memory meanwhile."""
    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(clients.watch())
        await asyncio.gather(*(tasks.create_task(clients.work(end)) for _ in range(WORKERS)))
        watching.cancel()


def write_config(directory: Path, sources: dict[str, str]) -> Path:
    """Write settings with memory for one model with its whole KV cache, and frequent evictions."""
    reserved = estimate.estimate(ModelSpec("a", sources["a"], min_context=CONTEXT)).total
    lines = [f"memory_limit = {reserved}", "min_residency = 0.5", "max_wait = 2"]
    for key, source in sources.items():
        lines += [f"[models.{key}]", f'source = "{source}"', f"min_context = {MIN_CONTEXT}", "max_waiting = 8"]
    path = directory / "models.toml"
    path.write_text("\n".join(lines))
    return path


def main(argv: list[str] | None = None) -> int:
    """Make the models, start a server, and run the soak test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=1.05, help="allowed ratio of the memory at the end")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        sources = {
            key: str(tiny_llama(Path(directory) / key, seed=n, hidden=256, layers=8, context=CONTEXT))
            for n, key in enumerate(KEYS)
        }
        sources[SEEING] = str(tiny_vision(Path(directory) / SEEING, "gemma3"))
        sources[VECTORS] = str(tiny_embedder(Path(directory) / VECTORS, "modernbert"))
        sources[RERANKER] = str(tiny_cross_encoder(Path(directory) / RERANKER, "bert"))
        config = write_config(Path(directory), sources)
        with running_server("--no-defaults", "--config", str(config), "--log-level", "warning") as server:
            status = 1
            try:
                status = 0 if asyncio.run(soak(server.url, sources, arguments)) else 1
            except* Broken as broken:
                print(f"broken: {broken.exceptions[0]}")
            except* asyncio.CancelledError:
                status = STOPPED
            if status == STOPPED:
                return status
            ended = server.stop()
    if "Traceback" in ended.stderr or ended.status:
        print(ended.stderr[-4000:])
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
