"""What the benchmarks add to the client's load generator (mlxserver/client/bench/load.py): paced connections.

Rule: a request that fails is a sample with an error, never an exception.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mlxserver.client.api import ChatClient, Message
from mlxserver.client.bench import load
from mlxserver.client.bench.load import Sample
from mlxserver.client.recorder import PreparedRequest, Recording

HOST = "127.0.0.1"
READ_TIMEOUT = 900.0  # seconds of silence: mlx_lm.server answers seeded requests one by one


class Target:
    """Server under load. Its requests open their connections at least so many seconds apart."""

    def __init__(self, client: ChatClient, connect_interval: float = 0.0) -> None:
        self._client, self._connect_interval = client, connect_interval
        self._connecting = asyncio.Lock()

    def prepare(
        self, model: str, messages: Sequence[Message], max_tokens: int, sampling: Mapping[str, Any]
    ) -> PreparedRequest:
        """Encode a streamed chat request."""
        request = self._client.prepare(messages, model, max_tokens=max_tokens, **sampling)

        async def send() -> Recording:
            async with self._connecting:
                await asyncio.sleep(self._connect_interval)
            return await request()

        return send if self._connect_interval else request


@asynccontextmanager
async def target(port: int, connect_interval: float = 0.0) -> AsyncGenerator[Target, None]:
    """Server on a port of this machine. connect_interval: least seconds between two connections."""
    async with ChatClient(f"http://{HOST}:{port}/v1", read_timeout=READ_TIMEOUT) as client:
        yield Target(client, connect_interval)


async def run_load(requests: Sequence[PreparedRequest], clients: int) -> list[Sample]:
    """Send all requests in a closed loop of `clients`. Failed ones are counted on stderr."""
    samples = await load.closed_loop(requests, clients)
    if failed := [sample.error for sample in samples if sample.error]:
        print(f"{len(failed)} of {len(samples)} requests failed, the first: {failed[0]}", file=sys.stderr, flush=True)
    return samples


async def run_one(request: PreparedRequest) -> Sample:
    """Send one request."""
    return load.read(await load.send(request))
