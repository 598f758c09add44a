"""Fuzzing of a running server with thousands of hostile requests to all of its endpoints (tools/hostile.py).

Run: python -m tools.fuzz [--requests 20000] [--warm 10000] [--seed 0] [--timeout 30] [--json]. It prints how
many answers of which status each dialect gave. Exit status 1 if a promise was broken:

Promise 1: every request is answered, or its connection closed, within the time-out; never with a 5xx. So few clients
never overload it: 503 and 507 are faults, too.
Promise 2: an answer has the shape that the OpenAPI document gives it, or is an error in the shape of the endpoint's
API, and short.
Promise 3: the server stays healthy, and its memory at the end is that after the warm-up, within 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from tools.harness.embedding_models import tiny_bert
from tools.harness.encoder_models import tiny_cross_encoder
from tools.harness.models import scripted_model, tiny_llama
from tools.harness.running_server import running_server
from tools.hostile import Case, Hostile
from tools.hostile_answers import fault_of
from tools.hostile_bodies import MODEL, RANKER, RESPONSE, TALKER, VECTORS
from tools.raw_http import Answer, Malformed, Wire, request

TIMEOUT = 30.0  # seconds; of an idle machine
WORKERS = 16
MOST_FAULTS = 30  # after so many it ends
KEPT_IDS = 50  # of responses
PARTS = 4  # the memory is measured after each part of the requests
PREFIX_CACHE = "512KiB"  # full after a few hundred requests, so that it does not look like a leak
STORED_BYTES = "512KiB"  # of responses, for the same reason
FLAGS = (
    *("--no-defaults", "--log-level", "critical", "--header-timeout", "1", "--body-timeout", "1"),
    *("--idle-connection-timeout", "5"),  # a connection that is left open must end within TIMEOUT
)
SPEECH = 'Let me add.\n</think>\n\nI call it.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


class Broken(Exception):
    """A promise was not kept."""


@dataclass
class Report:
    """What came of a run. outcomes: number of answers by target and status. sizes: the server's memory in bytes, before
    the run and after each part. slowest: seconds of the answer that took longest.
    """

    slowest: float = 0.0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def count(self, status: str) -> int:
        """The number of answers of a status."""
        return sum(count for (_, each), count in self.outcomes.items() if each == status)

    @property
    def by_target(self) -> dict[str, dict[str, int]]:
        """The numbers of answers by status, of each target."""
        return {
            target: {status: count for (of, status), count in sorted(self.outcomes.items()) if of == target}
            for target in sorted({target for target, _ in self.outcomes})
        }

    @property
    def growth(self) -> float:
        """Ratio of the memory at the end to that at the beginning."""
        return self.sizes[-1] / self.sizes[0]

    def __str__(self) -> str:
        rows = [f"{'':<20} {'all':>7}  by status"]
        for target, statuses in self.by_target.items():
            each = ", ".join(f"{status}: {count}" for status, count in statuses.items())
            rows.append(f"{target:<20} {sum(statuses.values()):>7}  {each}")
        in_mib = ", ".join(f"{size / 2**20:.1f}" for size in self.sizes)
        rows.append(f"slowest answer: {self.slowest:.1f} s")
        rows.append(f"MiB before, and after each part: {in_mib}; ratio of the last to the first: {self.growth:.3f}")
        return "\n".join([*rows, f"faults: {len(self.faults)}", *self.faults])

    def as_json(self) -> str:
        """The same as JSON."""
        return json.dumps(
            {"outcomes": self.by_target, "bytes": self.sizes, "slowest": self.slowest, "faults": self.faults}, indent=2
        )


class Fuzz:
    """Clients of one run."""

    def __init__(self, port: int, seed: int, max_wait: float) -> None:
        self._port = port
        self._max_wait = max_wait
        self._hostile = Hostile(seed)
        self._responses: deque[str] = deque(maxlen=KEPT_IDS)  # ids of responses that may be kept
        self.report = Report()

    async def run(self, requests: int) -> None:
        """Send `requests` hostile requests, fewer after MOST_FAULTS faults."""
        cases = (self._hostile.case() for _ in range(requests))

        async def work() -> None:
            for case in cases:
                if len(self.report.faults) >= MOST_FAULTS:
                    return
                await self._try(case)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(WORKERS):
                tasks.create_task(work())

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
        wire = await Wire.connect(self._port, self._max_wait)
        try:
            await wire.send(data)
            answer = await wire.answer()
        finally:
            wire.hang_up()
        if answer is None:
            raise Broken("the server closed the connection of a valid request")
        return answer

    async def _try(self, case: Case) -> None:
        wire = await Wire.connect(self._port, self._max_wait)
        kept = self._responses[0] if self._responses else RESPONSE
        self._responses.rotate()
        data = case.data.replace(RESPONSE.encode(), kept.encode())
        fault: str | None = None
        start = time.monotonic()
        try:
            await wire.send(data)
            if case.is_cut:
                self.report.outcomes[case.target, "cut"] += 1
            else:
                fault = await self._judge(case, wire)
        except TimeoutError:
            fault = f"no answer after {self._max_wait:g} seconds"
        except (Malformed, asyncio.IncompleteReadError, ValueError, KeyError) as error:
            fault = f"{type(error).__name__} {error}"
        finally:
            wire.hang_up()
        self.report.slowest = max(self.report.slowest, time.monotonic() - start)
        if fault:
            self.report.faults.append(f"{case.name}: {fault}; asked {data[:2000]!r}")

    async def _judge(self, case: Case, wire: Wire) -> str | None:
        """Count the answers to a case; the first fault of theirs."""
        for method in (*case.methods, "POST"):
            has_body = method != "HEAD"
            answer = await wire.answer(has_body=has_body)
            if answer is None:
                return None
            self.report.outcomes[case.target, str(answer.status)] += 1
            if fault := fault_of(answer, has_body, case.endpoint):
                return f"{fault}; {answer.status} {answer.body[:500]!r}"
            if case.target == "responses" and (found := re.search(rb"resp_[0-9a-f]{32}", answer.body)):
                self._responses.append(found[0].decode())
            if not has_body:  # an error before the method is known has a body all the same, and is the last
                return None
        return None


async def fuzz(port: int, requests: int, warm: int = 0, seed: int = 0, max_wait: float = TIMEOUT) -> Report:
    """Send hostile requests to a server with the models of write_models().

    max_wait: seconds for an answer. warm: number of other requests before, as what the allocator keeps for several
    large bodies at once is no leak.
    Raises Broken if the server is not healthy between them.
    """
    run = Fuzz(port, seed, max_wait)
    await run.run(warm)
    run.report.outcomes.clear()
    run.report.sizes.append(await run.check_health())
    for _ in range(PARTS):
        await run.run(requests // PARTS)
        run.report.sizes.append(await run.check_health())
    return run.report


def write_models(directory: Path) -> Path:
    """Write the models that are asked for; the path of the configuration that has them."""
    tiny = tiny_llama(directory / MODEL, context=256)
    tokens = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    talker = scripted_model(directory / TALKER, {"hello": SPEECH}, generation_prompt="<think>\n", tokens=tokens)
    others = {
        VECTORS: tiny_bert(directory / VECTORS),
        RANKER: tiny_cross_encoder(directory / RANKER, "bert"),
    }
    sections = [
        f'[models.{key}]\nsource = "{path}"\nprefix_cache_bytes = "{PREFIX_CACHE}"\n'
        for key, path in ((MODEL, tiny), (TALKER, talker))
    ]
    sections += [f'[models.{key}]\nsource = "{path}"\n' for key, path in others.items()]
    config = directory / "models.toml"
    config.write_text("\n".join([f'response_store_bytes = "{STORED_BYTES}"', *sections]))
    return config


def main(argv: list[str] | None = None) -> int:
    """Make models, start a server, and fuzz it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--warm", type=int, default=10_000, help="requests before the memory is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds, for each answer")
    parser.add_argument("--growth", type=float, default=1.05, help="allowed ratio of the memory at the end")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        config = write_models(Path(directory))
        with running_server(*FLAGS, "--config", str(config)) as server:
            options = arguments.requests, arguments.warm, arguments.seed, arguments.timeout
            report = asyncio.run(fuzz(server.port, *options))
            ended = server.stop()
    print(report.as_json() if arguments.json else report)
    print(ended.stderr, file=sys.stderr, end="")
    is_right = not report.faults and ended.status == 0 and "Traceback" not in ended.stderr
    return 0 if is_right and report.growth <= arguments.growth else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Broken as broken:
        sys.exit(f"broken: {broken}")
