"""Clients that hang up at random moments, beside others that stay: what the server keeps of them.

Run: python -m tools.hangups [--hangups 1000] [--seed 0]. Exit status 1 if a promise was broken:

Promise 1: those who stay get every token, in order.
Promise 2: a second after the last has left, no request is running or waiting, and no connection is left open.

How fast those are who stay is told as a ratio. Visitors of two kinds come in turns, in rounds: at the same times, with
the same requests. One kind hangs up on an endless answer after some time; the other asks for as many tokens as the
server was seen to compute for the first in that time, and reads them all. So the ratio of the stayers' tokens/s,
hang-ups to readers, is what hanging up itself costs them: below 1 it costs more than an answer that is read. On a busy
machine visits take longer, and fewer come in a second; so it is also told (on Linux) what one visit of each kind takes
of the server's processor time, beyond that which the stayers' tokens take when they are alone.
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
CONTEXT = 10**8  # the endless script never comes to its end
STAYING, VISITING = 4, 8  # clients at a time
LONGEST = 0.15  # seconds that a visit lasts
PACE = 0.2  # seconds from one visit of a client to its next
ROUNDS = 10  # of readers and of those that hang up
HASTY = 0.2  # part of the visitors that leave before they have asked
CALM = 3.0  # seconds in which those who stay are alone
WORDS = re.compile(r'"content":"(tick|tock) "')


class Broken(Exception):
    """A promise was not kept."""


@dataclass(frozen=True)
class Speed:
    """Tokens that came, and in how many seconds, by the clock and of the server's processors."""

    tokens: int
    seconds: float
    processor: float

    @property
    def by_clock(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def beyond(self, alone: Speed) -> float:
        """Seconds of the processors that so many tokens would not have taken alone."""
        return self.processor - self.tokens * alone.processor / alone.tokens


class Stayer:
    """A stream that is read for as long as it lasts."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.tokens = 0

    async def read(self) -> None:
        """Read on, for ever. Raises Broken where a token is missing or wrong."""
        rest = ""
        while data := await self._wire.lines():
            *lines, rest = (rest + data.decode()).split("\n\n")
            for word in WORDS.findall("\n\n".join(lines)):
                if word != ("tick", "tock")[self.tokens % 2]:
                    raise Broken(f"token {self.tokens} of a stream was {word!r}")
                self.tokens += 1
        raise Broken("a stream ended that has no end")


def chat(stream: bool, **parameters: int) -> bytes:
    """A request whose answer never ends by itself."""
    messages = [{"role": "user", "content": "forever"}]
    body = {"model": MODEL, "messages": messages, "stream": stream, **parameters}
    return request("POST", "/v1/chat/completions", json.dumps(body).encode())


class HangUps:
    """The clients of one run."""

    def __init__(self, port: int, process_id: int, seed: int) -> None:
        self._port = port
        self._connections = Path(f"/proc/{process_id}/fd")
        self._stat = Path(f"/proc/{process_id}/stat")
        self._random = random.Random(seed)
        self._stayers: list[Stayer] = []
        self._wires: list[Wire] = []
        self._pace = 0.0  # tokens/s that are computed for one visitor
        self._visited = 0.0  # seconds that requests had which were hung up on

    async def run(self, hangups: int) -> bool:
        """Come, leave, and tell what was kept. Raises Broken."""
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
        self._tell(hangups // ROUNDS, alone, readers, leavers)
        print(f"no request was left after {seconds:.3f} s; connections left open: {leaked}")
        return seconds <= 1.0 and leaked <= 0

    @staticmethod
    def _tell(visits: int, alone: Speed, readers: Sequence[Speed], leavers: Sequence[Speed]) -> None:
        """Print how fast those were who stayed, and what the visitors cost."""
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
        """See how many tokens the server computes in a second for one who hangs up."""
        tokens, rows = self._tokens, await self._rows()
        await self._visits(hangups, self._hang_up)
        visitors = await self._rows() - rows - (self._tokens - tokens)
        self._pace = max(0.0, visitors) / self._visited

    async def _rows(self) -> float:
        """Tokens that the server has computed so far."""
        wire = await Wire.connect(self._port)
        await wire.send(request("GET", "/metrics"))
        answer = await wire.answer()
        wire.hang_up()
        found = re.search(
            rf'mlx_server_batch_rows_sum{{model="{MODEL}"}} (\S+)', answer.body.decode() if answer else ""
        )
        if not found:
            raise Broken("the figures do not tell how many rows were computed")
        return float(found[1])

    async def _stay(self) -> asyncio.Task[None]:
        wire = await Wire.connect(self._port)
        await wire.send(chat(stream=True))
        self._wires.append(wire)
        self._stayers.append(Stayer(wire))
        return asyncio.create_task(self._stayers[-1].read())

    async def _speed(self, meanwhile: Awaitable[None]) -> Speed:
        """How fast those are who stay, while something else goes on."""
        started, tokens, processor = time.monotonic(), self._tokens, self._processor_seconds()
        await meanwhile
        seconds = time.monotonic() - started
        return Speed(self._tokens - tokens, seconds, self._processor_seconds() - processor)

    def _processor_seconds(self) -> float:
        """What the server has computed so far; 0 where that can't be told."""
        if not self._stat.exists():
            return 0.0
        ticks = self._stat.read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    @property
    def _tokens(self) -> int:
        return sum(stayer.tokens for stayer in self._stayers)

    async def _visits(self, count: int, visit: Callable[[float], Awaitable[None]]) -> None:
        """Let clients come so often, each at its pace, for a part of LONGEST seconds."""
        started = time.monotonic()

        async def client(first: int) -> None:
            for turn in range(first, count, VISITING):
                await asyncio.sleep(started + turn / VISITING * PACE - time.monotonic())
                await visit(self._random.uniform(0, LONGEST))

        async with asyncio.TaskGroup() as tasks:
            for first in range(VISITING):
                tasks.create_task(client(first))

    async def _read(self, seconds: float) -> None:
        """Come, ask for what is made in so many seconds, read all of it, and leave."""
        wire = await Wire.connect(self._port)
        if self._random.random() >= HASTY:
            await wire.send(chat(self._random.random() < 0.5, max_tokens=max(1, round(seconds * self._pace))))
            if (answer := await wire.answer()) is None or answer.status != 200:
                raise Broken(f"a request that was to be read got {answer}")
        wire.hang_up()

    async def _hang_up(self, seconds: float) -> None:
        """Come, ask, and leave: mostly while the answer is made, sometimes within the request."""
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
        """Seconds until no request is running or waiting, and none of the clients' connections is open."""
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
        """Open files more than before, once the last connections had a second to close."""
        for _ in range(10):
            if (leaked := self._open_files() - before) <= 0:
                return 0
            await asyncio.sleep(0.1)
        return leaked

    def _open_files(self) -> int:
        return len(list(self._connections.iterdir())) if self._connections.exists() else 0


def main(argv: list[str] | None = None) -> int:
    """Make a model, start a server, come and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hangups", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        path = scripted_model(Path(directory) / MODEL, {"forever": FOREVER})
        config = Path(directory) / "models.toml"
        section = f'[models.{MODEL}]\nsource = "{path}"\ncontext_length = {CONTEXT}\npreload = true\n'
        config.write_text(f'memory_limit = "100TB"\n{section}')  # of what such a context would take if it were used
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
