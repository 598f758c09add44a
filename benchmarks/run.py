"""Whole measurement: both servers, one after the other, then the ceiling; one table to stdout, JSON to a file.

Rule 1: the table goes to stdout, progress to stderr.
Rule 2: what was measured is written, even if a later part fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import settings
from benchmarks.load import target
from benchmarks.machine import has_gpu, read_machine
from benchmarks.models import DTYPES, EMBEDDED, SHAPES, prepare_pair
from benchmarks.report import RAW, render
from benchmarks.scenarios import Bench, Figures, Scenario, measure, scenarios
from benchmarks.servers import MLX_LM, OURS, ROOT, Server, child_environment, running
from benchmarks.settings import Sizes
from benchmarks.vocabulary import Prompts

RESULTS = Path(__file__).parent / "results"


def read_arguments(argv: Sequence[str] | None, gpu: bool) -> argparse.Namespace:
    """Parse the command line. Defaults depend on the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=[EMBEDDED, *SHAPES], default="1b" if gpu else EMBEDDED)
    add("--dtype", choices=DTYPES, default="bfloat16" if gpu else "float32")
    add("--quick", action="store_true", help="small counts: whether it works, not how fast it is")
    add("--only", action="append", metavar="NAME", help='scenario, as in "sampled c=4", "two models", "raw"')
    add("--server", action="append", choices=[MLX_LM, OURS], help="measure only this one")
    add("--tokenizer", type=Path, metavar="DIR", help="where random models take their tokenizer from")
    add("--work", type=Path, default=ROOT / "build" / "benchmarks", metavar="DIR", help="where models are made")
    add("--out", type=Path, metavar="FILE", help="JSON file of the results")
    for name in ("prompt_tokens", "max_tokens", "rounds", "seeded_rounds", "stream_tokens", "warmup_tokens"):
        add(f"--{name.replace('_', '-')}", type=int, metavar="N")
    add("--concurrency", type=lambda text: tuple(map(int, text.split(","))), metavar="N,N", help="ascending")
    return parser.parse_args(argv)


def choose_sizes(arguments: argparse.Namespace, gpu: bool) -> Sizes:
    """The sizes of the device, with the command line's changes."""
    sizes = settings.QUICK if arguments.quick else settings.GPU if gpu else settings.CPU
    given = {name: value for name, value in vars(arguments).items() if name in asdict(sizes) and value is not None}
    return replace(sizes, **given)


def measure_server(
    name: str, pair: tuple[Path, Path], sizes: Sizes, only: Sequence[str] | None, results: dict[str, Figures]
) -> None:
    """Measure the chosen scenarios on one server, and put their figures into results one by one."""
    chosen = {key: scenario for key, scenario in scenarios(sizes).items() if only is None or key in only}
    if not chosen:
        return
    with running(name, pair) as server:
        _report(f"{name} is up")
        asyncio.run(_measure_scenarios(server, Prompts(pair[0]), sizes, chosen, results))
        if memory := server.peak_memory():
            results["process"] = {"peak_memory": memory}


async def _measure_scenarios(
    server: Server, prompts: Prompts, sizes: Sizes, chosen: Mapping[str, Scenario], results: dict[str, Figures]
) -> None:
    async with target(server.port) as under_load:
        bench = Bench(under_load, server.models, prompts, sizes)
        await measure(bench, chosen, results, lambda line: _report(f"  {line}"))


def measure_raw(directory: Path, sizes: Sizes) -> dict[str, Figures]:
    """Measure the ceiling in a separate process."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "raw.json"
        command = [sys.executable, "-m", "benchmarks.raw", "--model", str(directory), "--out", str(out)]
        subprocess.run(
            [*command, "--sizes", json.dumps(asdict(sizes))], cwd=ROOT, env=child_environment(), stdout=sys.stderr
        ).check_returncode()
        results: dict[str, Figures] = json.loads(out.read_text(encoding="utf-8"))
    return results


def check_names(only: Sequence[str] | None, sizes: Sizes) -> None:
    """Raises SystemExit for a scenario that does not exist."""
    known = [*scenarios(sizes), RAW]
    for name in only or ():
        if name not in known:
            raise SystemExit(f"--only: {name!r} is not valid; expected one of: {', '.join(known)}")


def run(arguments: argparse.Namespace, sizes: Sizes, content: dict[str, Any]) -> None:
    """Measure, and put results into content one by one."""
    pair = prepare_pair(arguments.shape, arguments.dtype, arguments.work.resolve(), arguments.tokenizer)
    for server in arguments.server or (MLX_LM, OURS):
        content["results"][server] = {}
        measure_server(server, pair, sizes, arguments.only, content["results"][server])
    if arguments.only is None or RAW in arguments.only:
        content["results"][RAW] = measure_raw(pair[0], sizes)
        _report("raw engines measured")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    gpu = has_gpu()
    arguments = read_arguments(argv, gpu)
    sizes = choose_sizes(arguments, gpu)
    check_names(arguments.only, sizes)
    model = {"shape": arguments.shape, "dtype": arguments.dtype}
    samplings = {"greedy": settings.GREEDY, "sampled": settings.SAMPLED}
    content: dict[str, Any] = {
        "machine": read_machine(),
        "settings": {"model": model, "sizes": asdict(sizes), "sampling": samplings},
        "results": {},
    }
    name = f"{arguments.shape}-{arguments.dtype}-{'gpu' if gpu else 'cpu'}{'-quick' if arguments.quick else ''}.json"
    out = arguments.out or RESULTS / name
    try:
        run(arguments, sizes, content)
    finally:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(render(content))
    _report(f"written to {out}")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
