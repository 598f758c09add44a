"""Response to POST /v1/benchmark: the events of a benchmark, which a process of its own runs against this server.

Rule 1: the events come from the client's code in its own process: it neither slows the event loop nor waits for it.
Rule 2: however the response ends, the process ends with it. One runs at a time.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

import mlxserver
from mlxserver.api import sse
from mlxserver.api.dialect import Failure
from mlxserver.api.openai.errors import envelope
from mlxserver.server.event_stream import EventStream, until_disconnect

MODULE = "mlxserver.client.bench.service"
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
LINE_LIMIT = 1 << 20  # bytes


class BenchmarkResponse:
    """The response to one benchmark. lock: held while it runs. url, key: of this server, for its client."""

    def __init__(
        self, options: dict[str, Any], url: str, key: str, heartbeat_interval: float, lock: asyncio.Lock
    ) -> None:
        self._options = options
        self._environment = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}
        self._heartbeat_interval = heartbeat_interval
        self._lock = lock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the end, or until the client leaves."""
        async with (
            self._lock,
            EventStream(send, HEADERS, self._heartbeat_interval, lambda: sse.comment("keep-alive")) as stream,
        ):
            await until_disconnect(receive, self._send(stream), stream.beat)

    async def _send(self, stream: EventStream) -> None:
        await stream.start()
        process = await self._start()
        try:
            assert process.stdin and process.stdout
            process.stdin.write(orjson.dumps(self._options))
            process.stdin.close()
            last: dict[str, Any] = {}
            while line := await process.stdout.readline():
                last = orjson.loads(line)
                if last["event"] not in ("error", "done"):
                    await stream.write(sse.encode(line.strip()))
            await stream.end(_end(last))
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _start(self) -> Process:
        root = str(Path(mlxserver.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **self._environment, "PYTHONPATH": paths}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", MODULE, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=LINE_LIMIT, env=environment
        )


def _end(last: dict[str, Any]) -> bytes:
    """The last event: that it is done, or why not."""
    if last.get("event") == "done":
        return sse.encode(orjson.dumps(last))
    message = last.get("message") or "The benchmark ended early."
    return sse.encode(envelope(Failure(message, "server", code="benchmark_failed")))
