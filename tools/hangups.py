"""Clients that hang up at random moments, beside others that stay: what the server keeps of them.

Run: python -m tools.hangups [--hangups 1000] [--seed 0]. Exit status 1 if a promise was broken:

Promise 1: those who stay get every token, in order.
Promise 2: a second after the last has left, no request is running or waiting, and no connection is left open.

How fast those are who stay is told as a ratio. Visitors of two kinds come in turns, in rounds: at the same times, for
the same requests, and for as long. One kind asks for as many tokens as are made in its time, and reads them all; the
other asks for an endless answer, and hangs up when its time is over. Either way the server computes the same tokens, so
that the ratio of the stayers' tokens/s, hang-ups to readers, is what hanging up itself costs them; 1 is full speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

import engine  # noqa: F401  (first: it prepares the process for MLX)

# isort: split
from tests.models import scripted_model
from tests.running_server import running_server
from tests.scripts import Script
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
        self._random = random.Random(seed)
        self._stayers: list[Stayer] = []
        self._wires: list[Wire] = []
        self._pace = 0.0  # tokens/s of one stream

    async def run(self, hangups: int) -> bool:
        """Come, leave, and tell what was kept. Raises Broken."""
        open_before = self._open_files()
        reading = [await self._stay() for _ in range(STAYING)]
        alone = await self._speed(asyncio.sleep(CALM))
        self._pace = await self._speed(self._visits(hangups // ROUNDS, self._hang_up)) / STAYING
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
        ratios = [one / other for one, other in zip(leavers, readers, strict=True)]
        print(f"{hangups // ROUNDS * (ROUNDS + 1)} hang-ups; {STAYING} streams that stayed got")
        print(f"{alone:.0f} tokens/s alone, {median(readers):.0f} beside {VISITING} clients at a time that read all,")
        print(f"{median(leavers):.0f} beside as many that hung up: a ratio of {median(ratios):.3f} in the median round")
        print(f"(the {ROUNDS} rounds: {', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))})")
        print(f"no request was left after {seconds:.3f} s; connections left open: {leaked}")
        return seconds <= 1.0 and leaked <= 0

    async def _stay(self) -> asyncio.Task[None]:
        wire = await Wire.connect(self._port)
        await wire.send(chat(stream=True))
        self._wires.append(wire)
        self._stayers.append(Stayer(wire))
        return asyncio.create_task(self._stayers[-1].read())

    async def _speed(self, meanwhile: Awaitable[None]) -> float:
        """Tokens a second of those who stay, while something else goes on."""
        started, tokens = time.monotonic(), self._tokens
        await meanwhile
        return (self._tokens - tokens) / (time.monotonic() - started)

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
