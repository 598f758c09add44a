"""Fuzzing of a running server with thousands of hostile requests (tools/hostile.py).

Run: python -m tools.fuzz [--requests 20000] [--warm 10000] [--seed 0]. Exit status 1 if a promise was broken:

Promise 1: every request is answered, or its connection closed, within TIMEOUT seconds; never with a 5xx.
Promise 2: an answer is valid, or an error in the shape of the endpoint's API, and short.
Promise 3: the server stays healthy, and its memory at the end is that after the warm-up, within 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from jsonschema import Draft202012Validator

from mlxserver.api import openapi
from mlxserver.api.endpoints import ENDPOINTS
from mlxserver.api.schema.response_shapes import named
from tools.harness.models import tiny_llama
from tools.harness.running_server import running_server
from tools.hostile import Case, Hostile
from tools.hostile_bodies import MODEL
from tools.raw_http import Answer, Malformed, Wire, request

TIMEOUT = 30.0
WORKERS = 16
LONGEST_ERROR = 4096  # characters; the list of a request's parameters is in some
PARTS = 4  # the memory is measured after each part of the requests
PREFIX_CACHE = "512KiB"  # full after a few hundred requests, so that it does not look like a leak
FLAGS = (
    *("--no-defaults", "--log-level", "critical", "--header-timeout", "1", "--body-timeout", "1"),
    *("--idle-connection-timeout", "5"),  # a connection that is left open must end within TIMEOUT
)
LAST_EVENTS = ("message_stop", "response.completed", "response.incomplete")  # of streams without [DONE]
DOCUMENT = openapi.document(ENDPOINTS, "", "")
VALIDATORS = {
    name: Draft202012Validator({**named(name), "components": DOCUMENT["components"]})
    for name in DOCUMENT["components"]["schemas"]
}


class Broken(Exception):
    """A promise was not kept."""


class Fuzz:
    """Clients of one run. outcomes: counts of answers by status."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._hostile = Hostile(seed)
        self.outcomes: Counter[str] = Counter()

    async def run(self, requests: int) -> None:
        """Send `requests` hostile requests. Raises Broken."""
        cases = (self._hostile.case() for _ in range(requests))

        async def work() -> None:
            for case in cases:
                await self._try(case)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(WORKERS):
                    tasks.create_task(work())
        except* Broken as broken:
            raise broken.exceptions[0] from None

    async def check_health(self) -> int:
        """Check that the server answers and has no request left; the memory of its process in bytes. Raises Broken."""
        body = json.dumps(
            {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        ).encode()
        answer = await self._ask(request("POST", "/v1/chat/completions", body, "Connection: close"))
        if answer.status != 200:
            raise Broken(f"a valid request was answered with {answer.status} {answer.body!r}")
        model = json.loads((await self._ask(request("GET", f"/v1/models/{MODEL}", b"", "Connection: close"))).body)
        if (model["running_requests"], model["queued_requests"]) != (0, 0):
            raise Broken(f"requests are left: {model}")
        metrics = (await self._ask(request("GET", "/metrics", b"", "Connection: close"))).body.decode()
        figure = re.search(r"^mlx_server_process_bytes (\S+)$", metrics, re.MULTILINE)
        assert figure
        return int(float(figure[1]))

    async def _ask(self, data: bytes) -> Answer:
        wire = await Wire.connect(self._port, TIMEOUT)
        try:
            await wire.send(data)
            answer = await wire.answer()
        finally:
            wire.hang_up()
        if answer is None:
            raise Broken("the server closed the connection of a valid request")
        return answer

    async def _try(self, case: Case) -> None:
        wire = await Wire.connect(self._port, TIMEOUT)
        try:
            await wire.send(case.data)
            if case.is_cut:
                self.outcomes["cut"] += 1
                return
            for method in (*case.methods, "POST"):
                answer = await wire.answer(has_body=method != "HEAD")
                if answer is None:
                    break
                self._judge(case, answer, has_body=method != "HEAD")
                if method == "HEAD":  # an error before the method is known has a body all the same, and is the last
                    break
        except TimeoutError:
            raise Broken(f"{case.name}: no answer after {TIMEOUT:g} seconds to {case.data[:2000]!r}") from None
        except (Malformed, asyncio.IncompleteReadError, ValueError, KeyError) as error:
            raise Broken(f"{case.name}: {type(error).__name__} {error}; asked {case.data[:2000]!r}") from None
        finally:
            wire.hang_up()

    def _judge(self, case: Case, answer: Answer, *, has_body: bool) -> None:
        """Count an answer. Raises Broken for one that is neither valid nor an error object."""
        if fault := _fault(answer, has_body, case.path):
            raise Broken(f"{case.name}: {fault}; {answer.status} {answer.body[:500]!r}; asked {case.data[:2000]!r}")
        self.outcomes[str(answer.status)] += 1


def _fault(answer: Answer, has_body: bool, path: str | None) -> str | None:
    """The fault of an answer; None if it has none. path: of the endpoint that answered, None if it is not known."""
    if answer.status >= 500:
        return "a 5xx"
    if not has_body or answer.status == 204:
        return None
    kind = answer.headers.get("content-type", "")
    if answer.status >= 400:
        is_early = answer.status == 408  # perhaps before the path was read
        return _fault_of_error(json.loads(answer.body), None if is_early else path)
    if kind.startswith(("text/event-stream", "application/x-ndjson")):
        return _fault_of_end(answer.body.strip().rpartition(b"\n")[2].removeprefix(b"data: "), path)
    if kind == "application/json":
        json.loads(answer.body)
    return None


def _fault_of_end(last: bytes, path: str | None) -> str | None:
    """The fault of a stream's last event: [DONE], the last of its kind, or an error."""
    if last == b"[DONE]":
        return None
    content = json.loads(last)
    if isinstance(content, dict) and content.get("type") == "response.failed":
        return "a response that failed" if content["response"]["error"]["code"] == "server_error" else None
    fields = content if isinstance(content, dict) else {}
    if fields.get("type") in LAST_EVENTS or fields.get("done") is True or fields.get("status") == "success":
        chunks = [each.chunk for each in ENDPOINTS if each.chunk and path in (None, each.path)]
        return None if any(VALIDATORS[chunk].is_valid(content) for chunk in chunks) else "a last event of a wrong shape"
    return _fault_of_error(content, path)


def _fault_of_error(content: object, path: str | None) -> str | None:
    apis = [endpoint.api for endpoint in ENDPOINTS if path in (None, endpoint.path)]
    if not any(VALIDATORS[api.error_schema].is_valid(content) for api in apis):
        return "no error in the shape of the API"
    return None if len(json.dumps(content)) <= LONGEST_ERROR else "an error that echoes a long value"


async def fuzz(port: int, requests: int, warm: int = 0, seed: int = 0) -> tuple[Counter[str], list[int]]:
    """Send hostile requests: counts by outcome, and the server's memory in bytes before them and after each part.

    warm: number of other requests before, as what the allocator keeps for several large bodies at once is no leak.
    Raises Broken.
    """
    run = Fuzz(port, seed)
    await run.run(warm)
    sizes = [await run.check_health()]
    run.outcomes.clear()
    for _ in range(PARTS):
        await run.run(requests // PARTS)
        sizes.append(await run.check_health())
    return run.outcomes, sizes


def main(argv: list[str] | None = None) -> int:
    """Make a model, start a server, and fuzz it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--warm", type=int, default=10_000, help="requests before the memory is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=1.05, help="allowed ratio of the memory at the end")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        path = tiny_llama(Path(directory) / MODEL, context=256)
        config = Path(directory) / "models.toml"
        config.write_text(f'[models.{MODEL}]\nsource = "{path}"\nprefix_cache_bytes = "{PREFIX_CACHE}"\n')
        with running_server(*FLAGS, "--config", str(config)) as server:
            outcomes, sizes = asyncio.run(fuzz(server.port, arguments.requests, arguments.warm, arguments.seed))
            ended = server.stop()
    print("\n".join(f"{count:>7}  {outcome}" for outcome, count in sorted(outcomes.items())))
    growth = sizes[-1] / sizes[0]
    in_mib = ", ".join(f"{size / 2**20:.1f}" for size in sizes)
    print(f"MiB before, and after each part: {in_mib}; ratio of the last to the first: {growth:.3f}")
    return 0 if growth <= arguments.growth and ended.status == 0 and "Traceback" not in ended.stderr else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Broken as broken:
        sys.exit(f"broken: {broken}")
