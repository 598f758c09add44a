"""One process against several ranks with the same model: tokens/s and time to first token, in one run.

Run: python -m benchmarks.shards --backend nccl [--ranks 2] [--shape 8b] [--dtype bfloat16] [--shard tensor]
[--variables NAME=VALUE[,NAME=VALUE]]... All ranks are on this machine. Each --variables measures the ranks once more,
with these variables set. Prints a table, and writes the figures as JSON. Exit status 1 if a part failed, 128 and the
signal's number if it was interrupted, 142 after --limit seconds.

Rule 1: all are measured by the same load generator, with the same prompts, after one warm-up of each load.
Rule 2: what was measured is written, even if a later part fails or the run is interrupted. Every part has a time limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.load import Target, run_load, target
from benchmarks.machine import has_gpu, read_machine
from benchmarks.models import DTYPES, SHAPES, prepare_pair
from benchmarks.ranks import Deployment, running
from benchmarks.settings import GREEDY
from benchmarks.stats import summarise
from benchmarks.vocabulary import Prompts
from mlxserver.client.recorder import PreparedRequest

RESULTS = Path(__file__).parent / "results"
SHOWN = ("tokens_per_second", "ttft_p50", "ttft_p95", "gap_p50")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)

Figures = Mapping[str, float]


class Run:
    """Figures of a run, and the file that they are written to."""

    def __init__(self, arguments: argparse.Namespace, out: Path) -> None:
        self._arguments = arguments
        self._out = out
        self._begun = time.monotonic()
        self.figures: dict[str, dict[str, Figures]] = {}
        self.failures: dict[str, str] = {}

    def measure(self, directory: Path, deployment: Deployment) -> None:
        """Measure one deployment at each concurrency. An error is recorded as a failure."""
        name, limit = deployment.name, self._arguments.start_seconds
        try:
            with running(directory, deployment, max(self._arguments.concurrency), limit) as port:
                self.report(f"{name}: ready")
                for clients in self._arguments.concurrency:
                    figures = asyncio.run(self._load(port, Prompts(directory), clients))
                    self.figures.setdefault(name, {})[str(clients)] = figures
                    self._write()
                    self.report(f"{name}, c={clients}: {figures['tokens_per_second']:.1f} tokens/s")
        except BaseException as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
            self._write()
            self.report("\n".join([f"{name} failed: {self.failures[name]}", *getattr(error, "__notes__", ())]))
            if not isinstance(error, Exception):
                raise

    async def _load(self, port: int, prompts: Prompts, clients: int) -> Figures:
        """The figures of one load. Raises TimeoutError."""
        rounds, tokens, length = self._arguments.rounds, self._arguments.max_tokens, self._arguments.prompt_tokens

        def requests(server: Target, count: int) -> list[PreparedRequest]:
            questions = [{"role": "user", "content": prompts.make(length)} for _ in range(count)]
            return [server.prepare("m", [question], tokens, GREEDY) for question in questions]

        try:
            async with asyncio.timeout(self._arguments.load_seconds), target(port) as server:
                await run_load(requests(server, clients), clients)
                return summarise(await run_load(requests(server, clients * rounds), clients)).figures()
        except TimeoutError:
            raise TimeoutError(f"c={clients} took longer than {self._arguments.load_seconds:g} s") from None

    def report(self, line: str) -> None:
        """Print a line of progress, with the seconds since the beginning."""
        print(f"{time.monotonic() - self._begun:6.1f} s  {line}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        settings = {key: value for key, value in vars(self._arguments).items() if not isinstance(value, Path)}
        content = {"machine": read_machine(), "settings": settings, "results": self.figures, "failures": self.failures}
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def render(results: Mapping[str, Mapping[str, Figures]]) -> str:
    """A table with ratios to the first deployment; blank where there is no figure."""
    first = next(iter(results.values()))
    width = max(14, *(2 + len(name) for name in results))
    lines = [f"{'c':>4}  {'figure':<18}" + "".join(f"{name:>{width}}{'ratio':>7}" for name in results)]
    for clients in first:
        for name in SHOWN:
            measured = [each[clients][name] if clients in each else None for each in results.values()]
            cells = (_cell(value, measured[0], width) for value in measured)
            lines.append(f"{clients:>4}  {name:<18}" + "".join(cells))
    return "\n".join(lines)


def _cell(value: float | None, first: float | None, width: int) -> str:
    return f"{value:>{width}.4g}{value / first:>7.2f}" if value and first else " " * (width + 7)


def variables(text: str) -> dict[str, str]:
    """Parse NAME=VALUE,NAME=VALUE. Raises ValueError."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name and sign for name, sign, _ in pairs):
        raise ValueError(f"{text!r} is not valid; expected NAME=VALUE[,NAME=VALUE]")
    return {name: value for name, _, value in pairs}


def read_arguments(argv: Sequence[str] | None, gpu: bool) -> argparse.Namespace:
    """Parse the command line. Defaults depend on the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--backend", choices=("nccl", "ring"), default="nccl" if gpu else "ring")
    add("--ranks", type=int, default=2)
    add("--shard", choices=("tensor", "pipeline"), default="tensor")
    add("--variables", type=variables, action="append", default=[], help="measure the ranks with these, too")
    add("--shape", choices=SHAPES, default="8b" if gpu else "tiny")
    add("--dtype", choices=DTYPES, default="bfloat16" if gpu else "float32")
    add("--tokenizer", type=Path, metavar="DIR", help="where random models take their tokenizer from")
    add("--concurrency", type=int, nargs="+", default=[1, 16])
    add("--rounds", type=int, default=4, help="requests per client")
    add("--prompt-tokens", type=int, default=250)
    add("--max-tokens", type=int, default=128)
    add("--start-seconds", type=float, default=150.0, help="until a model must be loaded")
    add("--load-seconds", type=float, default=90.0, help="for one load, its warm-up included")
    add("--limit", type=int, default=420, help="seconds for all of it")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "mlx-benchmarks")
    add("--out", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one process, then the ranks."""
    arguments = read_arguments(argv, has_gpu())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out: Path = arguments.out or RESULTS / f"shards-{arguments.shape}-{arguments.backend}-{arguments.ranks}.json"
    run = Run(arguments, out)
    alone = Deployment(arguments.backend, 1, arguments.shard)
    deployments = [
        Deployment(arguments.backend, arguments.ranks, arguments.shard, more) for more in [{}, *arguments.variables]
    ]
    _be_interruptible(run.report)
    signal.alarm(arguments.limit)
    try:
        directory, _ = prepare_pair(arguments.shape, arguments.dtype, arguments.work.resolve(), arguments.tokenizer)
        run.report("the model's files are there")
        for deployment in (alone, *deployments):
            run.measure(directory, deployment)
    finally:
        if run.figures:
            print(render(run.figures))
            run.report(f"written to {out}")
    return 1 if run.failures else 0


def _be_interruptible(report: Callable[[str], None]) -> None:
    """Clean up and exit at the first signal; ignore later ones."""

    def stop(number: int, frame: object) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        report(f"interrupted by {signal.Signals(number).name}")
        raise SystemExit(128 + number)

    for each in SIGNALS:
        signal.signal(each, stop)


if __name__ == "__main__":
    sys.exit(main())
