"""Many streams at once on one small model, each compared with the same request alone.

Run: python -m tools.many_streams [--streams 512]. Exit status 1 if a promise was broken:

Promise 1: all are open at once, and all are complete: a role, the text, a finish reason, [DONE].
Promise 2: no two are mixed up: each text is that of the same greedy request alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from tools.harness.models import tiny_llama
from tools.harness.running_server import running_server

MODEL = "tiny"
TOKENS = 24


class Broken(Exception):
    """A promise was not kept."""


class Clients:
    """Clients of one run."""

    def __init__(self, session: aiohttp.ClientSession, url: str, streams: int) -> None:
        self._session = session
        self._url = f"{url}/v1/chat/completions"
        self._all_open = asyncio.Barrier(streams)

    async def alone(self, n: int) -> str:
        """The text of a request alone."""
        async with self._session.post(self._url, json=_body(n)) as response:
            return str((await response.json())["choices"][0]["message"]["content"])

    async def together(self, n: int) -> tuple[str, str]:
        """The id and the text of a stream, read once all are open. Raises Broken."""
        async with self._session.post(self._url, json=_body(n) | {"stream": True}) as response:
            if response.status != 200:
                raise Broken(f"stream {n}: {response.status} {await response.text()}")
            await self._all_open.wait()
            payloads = [line[6:].strip() async for line in response.content if line.startswith(b"data: ")]
        if payloads[-1:] != [b"[DONE]"]:
            raise Broken(f"stream {n} has no end: {payloads[-1:]}")
        return _read(n, [json.loads(payload) for payload in payloads[:-1]])


def _body(n: int) -> dict[str, object]:
    content = f"{n} times {n * 7919 % 1000}: what is it?"
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "temperature": 0}


def _read(n: int, chunks: list[dict[str, object]]) -> tuple[str, str]:
    """The id and the text of a stream's chunks. Raises Broken."""
    choices = [chunk["choices"][0] for chunk in chunks]  # type: ignore[index]
    ids = {str(chunk["id"]) for chunk in chunks}
    if len(ids) != 1 or choices[0]["delta"].get("role") != "assistant" or not choices[-1]["finish_reason"]:
        raise Broken(f"stream {n} is not in order: {chunks[:2]} ... {chunks[-2:]}")
    return ids.pop(), "".join(choice["delta"].get("content", "") for choice in choices)


async def compare(url: str, streams: int) -> float:
    """Send the requests one by one, then all at once; the seconds of the latter. Raises Broken."""
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = Clients(session, url, streams)
        alone = [await clients.alone(n) for n in range(streams)]
        started = time.monotonic()
        together = await asyncio.gather(*(clients.together(n) for n in range(streams)))
        seconds = time.monotonic() - started
    different = [n for n in range(streams) if together[n][1] != alone[n]]
    if different:
        n = different[0]
        raise Broken(f"{len(different)} of {streams} differ; stream {n}: {together[n][1]!r}, alone {alone[n]!r}")
    if len({id for id, _ in together}) != streams:
        raise Broken("two streams have one id")
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Make a model, start a server, and run the clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--running", type=int, default=128, help="streams that decode together; the others wait")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        path = tiny_llama(Path(directory) / MODEL, context=256)
        section = f'[models.{MODEL}]\nsource = "{path}"\npreload = true\nmax_running = {arguments.running}\n'
        config = Path(directory) / "models.toml"
        config.write_text(f"{section}max_waiting = {arguments.streams}\n")
        with running_server("--no-defaults", "--config", str(config), "--log-level", "warning") as server:
            seconds = asyncio.run(compare(server.url, arguments.streams))
            ended = server.stop()
    print(
        f"{arguments.streams} streams at once, {arguments.running} decoding together: all complete, in order, and the"
    )
    print(f"same as alone; {seconds:.1f} s, {arguments.streams * TOKENS / seconds:.0f} tokens/s")
    return int(ended.status)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Broken as broken:
        sys.exit(f"broken: {broken}")
