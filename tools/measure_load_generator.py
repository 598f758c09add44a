"""Accuracy of the load generator (mlxserver/client/bench), measured against a server that logs when it sends a token.

    python tools/measure_load_generator.py [STREAMS] [TOKENS]

Prints each figure twice: true (from the client's writing of a request to the server's writing of a token) and as the
load generator measured it. The server runs in a separate process; both read the same clock (perf_counter is the
machine's on Linux and macOS).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mlxserver.client.api import ChatClient  # noqa: E402
from mlxserver.client.bench.load import Run, run_level  # noqa: E402
from mlxserver.client.bench.plan import Level, Plan, user  # noqa: E402


async def measure(url: str, streams: int, tokens: int) -> Run:
    """Run three rounds of `streams` concurrent requests."""
    prompts = tuple(user(f"Question {n}") for n in range(16))
    params = {"max_tokens": tokens}
    plan = Plan(("clock",), prompts, concurrency=(streams,), requests=3 * streams, warmup=0, params=params)
    async with ChatClient(url) as client:
        return await run_level(client, plan, Level("clock", concurrency=streams))


def main() -> None:
    """Measure and print the comparison, in milliseconds."""
    streams, tokens = (int(value) for value in [*sys.argv[1:], "64", "100"][:2])
    command = [sys.executable, str(ROOT / "tools" / "streaming_server.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            run = asyncio.run(measure(url, streams, tokens))
            with urllib.request.urlopen(f"{url}/sent") as answer:
                sent: list[list[float]] = json.load(answer)
        finally:
            server.kill()
    starts = sorted(timing.start for timing in run.timings)
    # Both in the order of time: the server receives requests in the order in which they were written.
    ttft = [first - start for start, (_, first, *_) in zip(starts, sorted(sent), strict=True)]
    latency = [times[-1] - start for start, times in zip(starts, sorted(sent), strict=True)]
    gaps = [later - earlier for times in sent for earlier, later in pairwise(times[1:])]
    print(f"{streams} streams at once, {len(sent)} in all, {tokens} tokens each; errors: {len(run.errors)}")
    _print("TTFT p50", median(ttft), median(t.ttft or 0 for t in run.timings))
    _print("inter-token p50", median(gaps), median(gap for t in run.timings for gap in t.gaps))
    mean = sum(gaps) / len(gaps)
    _print("inter-token mean", mean, sum(sum(t.gaps) for t in run.timings) / sum(len(t.gaps) for t in run.timings))
    _print("end to end p50", median(latency), median(t.latency for t in run.timings))


def _print(name: str, sent: float, measured: float) -> None:
    difference = (measured - sent) * 1000
    print(f"{name:<18} true {sent * 1000:8.2f}   measured {measured * 1000:8.2f}   difference {difference:+.2f} ms")


if __name__ == "__main__":
    main()
