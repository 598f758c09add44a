"""Benchmark for another program: options as JSON on stdin, a line of JSON per event on stdout.

    echo '{"kind": "sweep", "models": ["a"], "concurrency": [1, 4]}' | python -m mlxserver.client.bench.service

Server and key are those of the environment (OPENAI_BASE_URL, OPENAI_API_KEY). Events: progress (label, done, total),
level (figures of one load) or phase (interference), done; or error, and nothing after it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mlxserver.client.api import ChatClient
from mlxserver.client.bench.figures import figures
from mlxserver.client.bench.interference import Interference, Phase, to_objects
from mlxserver.client.bench.load import run_level
from mlxserver.client.bench.plan import PROMPTS, Plan, user
from mlxserver.client.errors import ClientError

Options = Mapping[str, Any]


def main() -> int:
    """Run the benchmark of stdin. 0: done; 1: it failed, and the last line says why."""
    options = json.load(sys.stdin)
    try:
        asyncio.run(run(options))
    except (ClientError, OSError) as error:
        emit("error", message=str(error))
        return 1
    emit("done")
    return 0


async def run(options: Options) -> None:
    """Run one benchmark. Raises ClientError."""
    plan = Plan(
        tuple(options["models"]),
        tuple(map(user, PROMPTS)),
        concurrency=tuple(options["concurrency"]),
        requests=options["requests"],
        params={"max_tokens": options["max_tokens"]},
    )
    async with ChatClient() as client:
        await (interference if options["kind"] == "interference" else sweep)(client, plan)


async def sweep(client: ChatClient, plan: Plan) -> None:
    """Every model at every load."""
    for level in plan.levels:
        run = await run_level(client, plan, level, _counter(f"{level.model}, {level.name}", plan.requests))
        emit("level", figures=figures(run, plan.slo), errors=sorted(set(run.errors))[:3])


async def interference(client: ChatClient, plan: Plan) -> None:
    """The first model alone, and during the second one's work."""
    model, other = plan.models
    measured = Interference(client, plan, model, other)
    phases: list[Phase] = []
    for name, work in measured.phases:
        phases.append(await measured.run(name, work, _counter(f"{model}: {name}", plan.requests)))
        emit("phase", **to_objects(phases, plan)[-1])


def emit(event: str, **fields: Any) -> None:
    """Write one event."""
    print(json.dumps({"event": event, **fields}), flush=True)


def _counter(label: str, total: int) -> Callable[[], None]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        emit("progress", label=label, done=done, total=total)

    emit("progress", label=label, done=0, total=total)
    return count


if __name__ == "__main__":
    sys.exit(main())
