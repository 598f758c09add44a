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
# mlx_lm.server listens with a backlog of 5: a burst of connections would wait for TCP's retry after a second, and the
# figures would be those of the retry, not of the engine.
CONNECT_INTERVAL = 0.002


class Target:
    """Server under load. Its requests open their connections CONNECT_INTERVAL apart."""

    def __init__(self, client: ChatClient) -> None:
        self._client = client
        self._connecting = asyncio.Lock()

    def prepare(
        self, model: str, messages: Sequence[Message], max_tokens: int, sampling: Mapping[str, Any]
    ) -> PreparedRequest:
        """Encode a streamed chat request."""
        request = self._client.prepare(messages, model, max_tokens=max_tokens, **sampling)

        async def send() -> Recording:
            async with self._connecting:
                await asyncio.sleep(CONNECT_INTERVAL)
            return await request()

        return send


@asynccontextmanager
async def target(port: int) -> AsyncGenerator[Target, None]:
    """Server on a port of this machine."""
    async with ChatClient(f"http://{HOST}:{port}/v1", read_timeout=READ_TIMEOUT) as client:
        yield Target(client)


async def run_load(requests: Sequence[PreparedRequest], clients: int) -> list[Sample]:
    """Send all requests in a closed loop of `clients`. Failed ones are counted on stderr."""
    samples = await load.closed_loop(requests, clients)
    if failed := [sample.error for sample in samples if sample.error]:
        print(f"{len(failed)} of {len(samples)} requests failed, the first: {failed[0]}", file=sys.stderr, flush=True)
    return samples


async def run_one(request: PreparedRequest) -> Sample:
    """Send one request."""
    return load.read(await load.send(request))
