"""Thrashing: alternating requests to two models in memory for one. Counts the loads and times the requests.

Run: python -m tools.alternate [--requests 40] [--clients 8]. "mixed": the clients take requests from one list, in which
the models alternate. "apart": half of the clients send to one model only, half to the other. Each once without the
rules against thrashing, and once with them. Times in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import estimate
from tools.harness.models import tiny_llama
from tools.harness.running_server import running_server

KEYS = ("a", "b")


async def alternate(url: str, requests: int, clients: int, is_mixed: bool) -> tuple[float, float, float, int]:
    """Send all requests: the longest and the median latency, the time of all, and the number of loads."""
    one_list = iter(range(requests))
    lists = [one_list if is_mixed else iter([n % 2] * (requests // clients)) for n in range(clients)]
    times: list[float] = []
    started = time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session, url, work, times) for work in lists))
        total = time.monotonic() - started
        async with session.get(f"{url}/metrics") as response:
            lines = (await response.text()).splitlines()
    loads = sum(float(line.split()[-1]) for line in lines if line.startswith("mlx_server_loads_total"))
    return max(times), sorted(times)[len(times) // 2], total, int(loads)


async def client(session: aiohttp.ClientSession, url: str, work: Iterator[int], times: list[float]) -> None:
    """Send one request after the other."""
    for number in work:
        body = {
            "model": KEYS[number % 2],
            "messages": [{"role": "user", "content": f"Question {number}"}],
            "max_tokens": 100,
        }
        started = time.monotonic()
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            await response.read()
        times.append(time.monotonic() - started)


def main() -> int:
    """Measure and print all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        made = {key: tiny_llama(Path(directory) / key, hidden=256, layers=4, seed=n) for n, key in enumerate(KEYS)}
        limit = int(estimate.estimate(ModelSpec("a", str(made["a"]))).total * 1.5)
        models = [flag for key, path in made.items() for flag in ("--model", f"{key}={path}")]
        for is_mixed in (True, False):
            for name, rules in {"without": ("0", "0"), "with": ("10", "30")}.items():
                flags = ["--no-defaults", *models, "--memory-limit", str(limit), "--log-level", "error"]
                with running_server(*flags, "--min-residency", rules[0], "--max-wait", rules[1]) as server:
                    figures = asyncio.run(alternate(server.url, arguments.requests, arguments.clients, is_mixed))
                    server.stop()
                longest, median, total, loads = figures
                kind = "mixed" if is_mixed else "apart"
                print(f"{kind} {name:<8} loads {loads:>3}  longest {longest:.2f}  median {median:.2f}  all {total:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
