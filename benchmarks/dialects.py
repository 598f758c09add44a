"""Streams of one model in each dialect: tokens/s, and the ratio to chat completions.

All dialects are measured in turn in each round, on one server, so that a machine that slows down slows all of them.
Bytes are read and not parsed, so that what differs is the server's part; the server's time on a processor is counted
per token, too, as it depends less on what else the machine does. By default the model is a scripted one: it
costs next to nothing, gives an event for each token, and never ends by itself.

python -m benchmarks.dialects [--clients 16] [--tokens 256] [--rounds 3] [--source DIRECTORY] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.agent_session import cpu_seconds
from benchmarks.machine import read_machine
from tools.harness.models import scripted_model
from tools.harness.running_server import RunningServer, running_server
from tools.harness.scripts import Script, cue

MODEL = "m"
TIMEOUT = 600.0  # seconds of an answer
TARGET = 0.95  # least ratio to chat completions
REQUESTS = 2  # of each client, one behind the other, in a round
CONTEXT = 8192
SCRIPT = Script([f"word{number} " for number in range(32)], endless=True)


@dataclass(frozen=True, slots=True)
class Dialect:
    """A dialect. body: of a request for so many tokens. count: the name that their number has in the last event."""

    path: str
    body: Callable[[str, int], Mapping[str, Any]]
    count: str


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


DIALECTS: Mapping[str, Dialect] = {
    "chat": Dialect(
        "/v1/chat/completions",
        lambda text, n: {"messages": _chat(text), "max_tokens": n, "stream_options": {"include_usage": True}},
        "completion_tokens",
    ),
    "completions": Dialect(
        "/v1/completions",
        lambda text, n: {"prompt": text + cue(0), "max_tokens": n, "stream_options": {"include_usage": True}},
        "completion_tokens",
    ),
    "messages": Dialect(
        "/v1/messages",
        lambda text, n: {"messages": _chat(text), "max_tokens": n},
        "output_tokens",
    ),
    "responses": Dialect(
        "/v1/responses",
        lambda text, n: {"input": text, "max_output_tokens": n},
        "output_tokens",
    ),
    "ollama": Dialect(
        "/api/chat",
        lambda text, n: {"messages": _chat(text), "options": {"num_predict": n}},
        "eval_count",
    ),
}


@dataclass(frozen=True, slots=True)
class Rate:
    """What one round of a dialect gave: tokens/s of all clients together, and microseconds of the server per token."""

    tokens_per_second: float
    cpu_us_per_token: float


class Load:
    """Closed loops of streams against one server."""

    def __init__(self, server: RunningServer, clients: int, tokens: int) -> None:
        self._server = server
        self._clients = clients
        self._tokens = tokens
        self._numbers = count()

    async def rate(self, dialect: Dialect) -> Rate:
        """One round. Raises RuntimeError for a stream that did not end as it should."""

        async def client() -> int:
            return sum([await self._stream(dialect) for _ in range(REQUESTS)])

        start, cpu = time.perf_counter(), cpu_seconds(self._server)
        tokens = sum(await asyncio.gather(*(client() for _ in range(self._clients))))
        seconds, busy = time.perf_counter() - start, cpu_seconds(self._server) - cpu
        return Rate(tokens / seconds, busy / tokens * 1e6)

    async def _stream(self, dialect: Dialect) -> int:
        """Read one stream; the number of its tokens."""
        text = f"This is question {next(self._numbers)}."
        body = json.dumps({"model": MODEL, "stream": True, **dialect.body(text, self._tokens)}).encode()
        head = f"POST {dialect.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
            writer.write(head.encode() + b"\r\n\r\n" + body)
            answer = await reader.read(-1)
        writer.close()
        found = re.findall(rb'"%b":(\d+)' % dialect.count.encode(), answer[-4096:])
        if not found:
            raise RuntimeError(f"{dialect.path}: {answer[:500]!r} ... {answer[-500:]!r}")
        return int(found[-1])


async def measure(server: RunningServer, clients: int, tokens: int, rounds: int) -> dict[str, list[Rate]]:
    """What each dialect gave, round by round; a short round before them warms up."""
    for dialect in DIALECTS.values():
        await Load(server, clients, tokens // 8).rate(dialect)
    load = Load(server, clients, tokens)
    rates: dict[str, list[Rate]] = {name: [] for name in DIALECTS}
    names = [*DIALECTS]
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rates[name].append(await load.rate(DIALECTS[name]))
    return rates


def ratio(rates: Mapping[str, Sequence[Rate]], name: str) -> float:
    """A dialect's median of tokens/s, as a part of that of chat completions."""
    return _median(rates[name]) / _median(rates["chat"])


def table(rates: Mapping[str, Sequence[Rate]]) -> str:
    """The medians, their ratio to that of chat completions, and all rounds."""
    rows = ["| dialect | tokens/s | of chat | server, us per token | rounds |", "| --- | ---: | ---: | ---: | --- |"]
    for name, measured in rates.items():
        each = ", ".join(f"{rate.tokens_per_second:.0f}" for rate in measured)
        cpu = median(rate.cpu_us_per_token for rate in measured)
        rows.append(f"| {name} | {_median(measured):.0f} | {ratio(rates, name):.3f} | {cpu:.0f} | {each} |")
    return "\n".join(rows)


def _median(rates: Sequence[Rate]) -> float:
    return median(rate.tokens_per_second for rate in rates)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the model, start a server and measure; 1 if a dialect is below TARGET."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", help="a model in the place of the scripted one")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        scripted = Path(directory) / MODEL
        source = arguments.source or scripted_model(scripted, {"question": SCRIPT}, context=CONTEXT)
        config = Path(directory) / "models.toml"
        config.write_text(f'[models.{MODEL}]\nsource = "{source}"\npreload = true\nmax_running = {arguments.clients}\n')
        with running_server("--no-defaults", "--config", str(config), "--log-level", "warning") as server:
            rates = asyncio.run(measure(server, arguments.clients, arguments.tokens, arguments.rounds))
    print(table(rates))
    if arguments.out:
        figures = {name: [asdict(rate) for rate in each] for name, each in rates.items()}
        arguments.out.write_text(json.dumps({"machine": read_machine(), "rounds": figures}, indent=2))
    return int(any(ratio(rates, name) < TARGET for name in rates))


if __name__ == "__main__":
    sys.exit(main())
