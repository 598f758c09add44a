"""One process against several ranks that share the same model: tokens/s and time to the first token, in one run.

Run: python -m benchmarks.shards --backend nccl [--ranks 2] [--shape 8b] [--dtype bfloat16] [--shard tensor]. All ranks
are on this machine, started with what mlx.launch gives them; with nccl each has a GPU of its own. Prints a table, and
writes the figures as JSON.

Rule: both are measured by the same load generator, with the same prompts, each load once before it counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.load import HOST, Job, LoadGenerator
from benchmarks.machine import has_gpu, read_machine
from benchmarks.models import DTYPES, SHAPES, prepare_pair
from benchmarks.servers import ROOT, ServerFailed, child_environment
from benchmarks.settings import GREEDY
from benchmarks.stats import summarise
from benchmarks.vocabulary import Prompts

RESULTS = Path(__file__).parent / "results"
SETTINGS = """
[models.m]
source = "{directory}"
preload = true
prefix_cache_bytes = 0
"""
SHOWN = ("tokens_per_second", "ttft_p50", "ttft_p95", "gap_p50")


def rank_environments(backend: str, size: int, directory: Path) -> list[dict[str, str]]:
    """What mlx.launch sets for each rank; nothing for a process that is alone."""
    if size == 1:
        return [{"CUDA_VISIBLE_DEVICES": "0"} if backend == "nccl" else {}]
    if backend == "nccl":
        shared = {"NCCL_HOST_IP": HOST, "NCCL_PORT": str(free_port()), "MLX_WORLD_SIZE": str(size)}
        return [{**shared, "MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)} for rank in range(size)]
    hosts = directory / "hosts.json"
    hosts.write_text(json.dumps([[f"{HOST}:{free_port()}"] for _ in range(size)]), encoding="utf-8")
    return [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(size)]


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(directory: Path, backend: str, size: int, shard: str) -> Iterator[int]:
    """A server whose model is loaded, in one process or shared by ranks; its port. Raises ServerFailed."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as log:
        settings = Path(scratch) / "settings.toml"
        text = SETTINGS.format(directory=directory) + (f'shard = "{shard}"\n' if size > 1 else "")
        settings.write_text(text, encoding="utf-8")
        flags = ["--no-defaults", "--log-level", "warning", "--port", str(port), "--config", str(settings)]
        processes = [
            subprocess.Popen(
                [sys.executable, "mlx_api_server.py", *flags],
                cwd=ROOT,
                env=child_environment() | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            for environment in rank_environments(backend, size, Path(scratch))
        ]
        try:
            await_greeting(processes[0])
            yield port
        except Exception as error:
            log.seek(0)
            error.add_note(f"The ranks' last words:\n{log.read()[-4000:]}")
            raise
        finally:
            end(processes)


def await_greeting(process: subprocess.Popen[str]) -> None:
    """Wait until the model is loaded."""
    assert process.stdout
    if not any(line.startswith("Serving on") for line in process.stdout):
        raise ServerFailed(f"the server ended with status {process.wait()} at its start")


def end(processes: list[subprocess.Popen[str]]) -> None:
    """Stop the server, and the other ranks with it."""
    processes[0].terminate()
    until = time.monotonic() + 30
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def measure(port: int, prompts: Prompts, arguments: argparse.Namespace) -> dict[str, Mapping[str, float]]:
    """The figures at each concurrency."""
    generator = LoadGenerator(port)
    figures: dict[str, Mapping[str, float]] = {}

    def jobs(count: int) -> list[Job]:
        texts = [prompts.make(arguments.prompt_tokens) for _ in range(count)]
        return [Job("m", [{"role": "user", "content": text}], arguments.max_tokens, GREEDY) for text in texts]

    for clients in arguments.concurrency:
        await generator.run(jobs(clients), clients)
        records = await generator.run(jobs(clients * arguments.rounds), clients)
        figures[str(clients)] = summarise(records).figures()
    return figures


def render(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A table, with the ratio of several ranks to one process."""
    alone, shared = results.values()
    names = [*results, "ratio"]
    lines = [f"{'c':>4}  {'figure':<18}" + "".join(f"{name:>14}" for name in names)]
    for clients, figures in alone.items():
        for name in SHOWN:
            one, several = figures[name], shared[clients][name]
            lines.append(f"{clients:>4}  {name:<18}{one:>14.4g}{several:>14.4g}{several / one:>14.2f}")
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=("nccl", "ring"), default="nccl" if has_gpu() else "ring")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shard", choices=("tensor", "pipeline"), default="tensor")
    parser.add_argument("--shape", choices=SHAPES, default="8b" if has_gpu() else "tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if has_gpu() else "float32")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client")
    parser.add_argument("--prompt-tokens", type=int, default=250)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mlx-benchmarks")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure one process, then the ranks."""
    arguments = read_arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    directory, _ = prepare_pair(arguments.shape, arguments.dtype, arguments.work.resolve())
    results: dict[str, dict[str, Mapping[str, float]]] = {}
    for size, name in ((1, "one process"), (arguments.ranks, f"{arguments.ranks} ranks")):
        with running(directory, arguments.backend, size, arguments.shard) as port:
            results[name] = asyncio.run(measure(port, Prompts(directory), arguments))
    settings: dict[str, Any] = {key: value for key, value in vars(arguments).items() if key not in ("work", "out")}
    content = {"machine": read_machine(), "settings": settings, "results": results}
    name = f"shards-{arguments.shape}-{arguments.backend}-{arguments.ranks}.json"
    out: Path = arguments.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(render(results))
    print(f"kept in {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
