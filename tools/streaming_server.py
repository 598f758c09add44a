"""Reference server for a load generator: sends tokens at exact times, and logs when it sent each.

Rule 1: the n-th token of an answer is due TTFT + n * INTERVAL after its request arrived; nothing depends on the client.
Rule 2: GET /sent returns when each token was sent, on the clock of the whole machine (perf_counter).
"""

from __future__ import annotations

import asyncio
import json
import sys
from time import perf_counter
from typing import cast

TTFT, INTERVAL = 0.1, 0.01
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nConnection: close\r\n"


class Connection(asyncio.Protocol):
    """Connection with one request."""

    sent: list[list[float]] = []  # noqa: RUF012  (one list per stream, of all connections)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)
        self._received = b""

    def data_received(self, data: bytes) -> None:
        """Called by the event loop. Answers the request once it is complete."""
        at = perf_counter()
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        if not found or len(body) < length:
            return
        self._received = b""
        if head.startswith(b"POST"):
            self._answer(at, _length(json.loads(body)))
        elif head.startswith(b"DELETE"):
            self.sent.clear()
            self._write_json([])
        else:
            self._write_json(self.sent if b"/sent" in head else {"data": [{"id": "clock"}]})

    def _answer(self, at: float, count: int) -> None:
        self._transport.write(HEAD % b"text/event-stream" + b"Transfer-Encoding: chunked\r\n\r\n")
        times = [at]
        self.sent.append(times)
        loop = asyncio.get_running_loop()
        now = loop.time() - (perf_counter() - at)
        for n in range(count):
            loop.call_at(now + TTFT + n * INTERVAL, self._send_token, times, n == count - 1, count)

    def _send_token(self, times: list[float], is_last: bool, count: int) -> None:
        event = _event([{"index": 0, "delta": {"content": "word "}, "finish_reason": "stop" if is_last else None}])
        times.append(perf_counter())
        if is_last:
            usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
            event += _event([], usage) + _chunk(b"data: [DONE]\n\n") + _chunk(b"")
        self._transport.write(event)
        if is_last:
            self._transport.close()

    def _write_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._transport.write(HEAD % b"application/json" + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self._transport.close()


def _event(choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "clock", "choices": choices}
    return _chunk(b"data: " + json.dumps(chunk | {"usage": usage}).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _length(request: dict[str, int]) -> int:
    """The number of tokens requested, by either name."""
    return request.get("max_completion_tokens") or request["max_tokens"]


async def serve(port: int) -> None:
    """Serve until the process ends."""
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    import gc

    import uvloop

    gc.disable()
    uvloop.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
