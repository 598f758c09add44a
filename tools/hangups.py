"""Hang-ups: clients that close their connection at random moments, beside streams that stay; leaks and costs.

Run: python -m tools.hangups [--hangups 1000] [--seed 0]. Exit status 1 if a promise was broken:

Promise 1: the streams that stay get every token, in order.
Promise 2: a second after the last hang-up, no request is running or waiting, and no connection is left open.

The cost of hang-ups is a ratio of the staying streams' tokens/s. Visitors of two kinds take turns, in rounds, at the
same times, with the same requests. Leavers hang up on an endless answer after some time; readers ask for as many tokens
as the server computed for the leavers in that time, and read them all. The ratio, leavers to readers, is the cost of
hanging up itself: below 1, a hang-up costs more than an answer that is read. On a busy machine visits take longer, and
there are fewer per second; so the server's processor time per visit of each kind is printed, too (on Linux), less the
time that the tokens of the staying streams take alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tools.harness.models import scripted_model
from tools.harness.running_server import running_server
from tools.harness.scripts import Script
from tools.raw_http import Wire, request

MODEL = "talker"
FOREVER = Script(["tick ", "tock "], endless=True)
CONTEXT = 10**8  # more than the endless script generates in a run
STAYING, VISITING = 4, 8  # clients at a time
LONGEST = 0.15  # seconds of the longest visit
PACE = 0.2  # seconds from one visit of a client to its next
ROUNDS = 10  # of readers and of leavers
HASTY = 0.2  # share of the visitors that leave before their request is sent
CALM = 3.0  # seconds in which the staying streams are alone
WORDS = re.compile(r'"content":"(tick|tock) "')


class Broken(Exception):
    """A promise was not kept."""


@dataclass(frozen=True)
class Speed:
    """Speed of the staying streams: their tokens, the seconds by the clock, and the server's processor seconds."""

    tokens: int
    seconds: float
    processor: float

    @property
    def by_clock(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def beyond(self, alone: Speed) -> float:
        """Processor seconds beyond those that as many tokens take alone."""
        return self.processor - self.tokens * alone.processor / alone.tokens


class Stayer:
    """Staying stream. tokens: how many were received."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.tokens = 0

    async def read(self) -> None:
        """Read without end. Raises Broken if a token is missing or wrong, or the stream ends."""
        rest = ""
        while data := await self._wire.lines():
            *lines, rest = (rest + data.decode()).split("\n\n")
            for word in WORDS.findall("\n\n".join(lines)):
                if word != ("tick", "tock")[self.tokens % 2]:
                    raise Broken(f"token {self.tokens} of a stream was {word!r}")
                self.tokens += 1
        raise Broken("a stream ended that has no end")


def chat(stream: bool, **parameters: int) -> bytes:
    """A request whose answer has no end."""
    messages = [{"role": "user", "content": "forever"}]
    body = {"model": MODEL, "messages": messages, "stream": stream, **parameters}
    return request("POST", "/v1/chat/completions", json.dumps(body).encode())


class HangUps:
    """Clients of one run."""

    def __init__(self, port: int, process_id: int, seed: int) -> None:
        self._port = port
        self._connections = Path(f"/proc/{process_id}/fd")
        self._stat = Path(f"/proc/{process_id}/stat")
        self._random = random.Random(seed)
        self._stayers: list[Stayer] = []
        self._wires: list[Wire] = []
        self._rate = 0.0  # tokens/s that are computed for one leaver
        self._visited = 0.0  # seconds of all requests that were hung up on

    async def run(self, hangups: int) -> bool:
        """Run all rounds and print the figures; whether all promises were kept. Raises Broken."""
        open_before = self._open_files()
        reading = [await self._stay() for _ in range(STAYING)]
        alone = await self._speed(asyncio.sleep(CALM))
        await self._calibrate(hangups // ROUNDS)
        readers, leavers = [], []
        for _ in range(ROUNDS):
            readers.append(await self._speed(self._visits(hangups // ROUNDS, self._read)))
            leavers.append(await self._speed(self._visits(hangups // ROUNDS, self._hang_up)))
        for task in reading:
            if task.done():
                await task
            task.cancel()
        for wire in self._wires:
            wire.hang_up()
        seconds = await self._until_idle()
        leaked = await self._leaked(open_before)
        self._report(hangups // ROUNDS, alone, readers, leavers)
        print(f"no request was left after {seconds:.3f} s; connections left open: {leaked}")
        return seconds <= 1.0 and leaked <= 0

    @staticmethod
    def _report(visits: int, alone: Speed, readers: Sequence[Speed], leavers: Sequence[Speed]) -> None:
        """Print the speeds of the staying streams, and the costs of the visitors."""
        ratios = sorted(one.by_clock / other.by_clock for one, other in zip(leavers, readers, strict=True))
        print(
            f"{visits * (ROUNDS + 1)} hang-ups; {STAYING} streams that stayed got {alone.by_clock:.0f} tokens/s alone"
        )
        print(f"and, beside {VISITING} clients, {median(speed.by_clock for speed in readers):.0f} while those read all")
        print(
            f"and {median(speed.by_clock for speed in leavers):.0f} while they hung up: a ratio of {median(ratios):.2f}"
        )
        print(f"in the median of {ROUNDS} rounds ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
        read, hung_up = (median(speed.beyond(alone) / visits for speed in speeds) for speeds in (readers, leavers))
        if alone.processor:
            print(
                f"processor time of the server for a visit: {read * 1000:.1f} ms read, {hung_up * 1000:.1f} ms hung up"
            )

    async def _calibrate(self, hangups: int) -> None:
        """Measure how many tokens per second the server computes for one leaver."""
        tokens, computed = self._tokens, await self._computed_tokens()
        await self._visits(hangups, self._hang_up)
        visitors = await self._computed_tokens() - computed - (self._tokens - tokens)
        self._rate = max(0.0, visitors) / self._visited

    async def _computed_tokens(self) -> float:
        """Tokens that the server has computed so far."""
        wire = await Wire.connect(self._port)
        await wire.send(request("GET", "/metrics"))
        answer = await wire.answer()
        wire.hang_up()
        found = re.search(
            rf'mlx_server_batch_rows_sum{{model="{MODEL}"}} (\S+)', answer.body.decode() if answer else ""
        )
        if not found:
            raise Broken("/metrics lacks mlx_server_batch_rows")
        return float(found[1])

    async def _stay(self) -> asyncio.Task[None]:
        wire = await Wire.connect(self._port)
        await wire.send(chat(stream=True))
        self._wires.append(wire)
        self._stayers.append(Stayer(wire))
        return asyncio.create_task(self._stayers[-1].read())

    async def _speed(self, meanwhile: Awaitable[None]) -> Speed:
        """The speed of the staying streams during something else."""
        started, tokens, processor = time.monotonic(), self._tokens, self._processor_seconds()
        await meanwhile
        seconds = time.monotonic() - started
        return Speed(self._tokens - tokens, seconds, self._processor_seconds() - processor)

    def _processor_seconds(self) -> float:
        """Processor seconds of the server so far; 0 where the system does not report them."""
        if not self._stat.exists():
            return 0.0
        ticks = self._stat.read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    @property
    def _tokens(self) -> int:
        return sum(stayer.tokens for stayer in self._stayers)

    async def _visits(self, count: int, visit: Callable[[float], Awaitable[None]]) -> None:
        """Let VISITING clients make `count` visits, each of up to LONGEST seconds, one per PACE seconds and client."""
        started = time.monotonic()

        async def client(first: int) -> None:
            for turn in range(first, count, VISITING):
                await asyncio.sleep(started + turn / VISITING * PACE - time.monotonic())
                await visit(self._random.uniform(0, LONGEST))

        async with asyncio.TaskGroup() as tasks:
            for first in range(VISITING):
                tasks.create_task(client(first))

    async def _read(self, seconds: float) -> None:
        """Visit of a reader: request as many tokens as are generated in `seconds`, and read them all."""
        wire = await Wire.connect(self._port)
        if self._random.random() >= HASTY:
            await wire.send(chat(self._random.random() < 0.5, max_tokens=max(1, round(seconds * self._rate))))
            if (answer := await wire.answer()) is None or answer.status != 200:
                raise Broken(f"a request that was to be read got {answer}")
        wire.hang_up()

    async def _hang_up(self, seconds: float) -> None:
        """Visit of a leaver: hang up after `seconds`, mostly during the answer, sometimes within the request."""
        wire = await Wire.connect(self._port)
        data = chat(stream=self._random.random() < 0.5)
        if self._random.random() < HASTY:
            data = data[: self._random.randrange(len(data))]
        else:
            self._visited += seconds
        await wire.send(data)
        await asyncio.sleep(seconds)
        wire.hang_up()

    async def _until_idle(self) -> float:
        """Seconds until no request is running or waiting. Raises Broken after 30."""
        started = time.monotonic()
        while time.monotonic() - started < 30:
            wire = await Wire.connect(self._port)
            await wire.send(request("GET", f"/v1/models/{MODEL}", b"", "Connection: close"))
            answer = await wire.answer()
            wire.hang_up()
            assert answer
            model = json.loads(answer.body)
            if (model["running_requests"], model["queued_requests"]) == (0, 0):
                return time.monotonic() - started
        raise Broken(f"requests are left after 30 seconds: {model}")

    async def _leaked(self, before: int) -> int:
        """How many more files are open than before, after up to a second for connections to close."""
        for _ in range(10):
            if (leaked := self._open_files() - before) <= 0:
                return 0
            await asyncio.sleep(0.1)
        return leaked

    def _open_files(self) -> int:
        return len(list(self._connections.iterdir())) if self._connections.exists() else 0


def main(argv: list[str] | None = None) -> int:
    """Make a model, start a server, and run the clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hangups", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        path = scripted_model(Path(directory) / MODEL, {"forever": FOREVER})
        config = Path(directory) / "models.toml"
        section = f'[models.{MODEL}]\nsource = "{path}"\ncontext_length = {CONTEXT}\npreload = true\n'
        config.write_text(f'memory_limit = "100TB"\n{section}')  # enough for the KV cache of such a context
        with running_server("--no-defaults", "--config", str(config), "--log-level", "warning") as server:
            clients = HangUps(server.port, server.process.pid, arguments.seed)
            is_kept = asyncio.run(clients.run(arguments.hangups))
            ended = server.stop()
    if "Traceback" in ended.stderr or ended.status:
        print(ended.stderr[-4000:])
        return 1
    return 0 if is_kept else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Broken as broken:
        sys.exit(f"broken: {broken}")
