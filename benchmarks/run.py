"""Whole measurement: this server beside others on the same machine, in turn; one table to stdout, JSON to a file.

All servers are started once. Each scenario is measured on each of them in turn, while the others are stopped, in
several rounds; a ratio is the median of the rounds' ratios.

Rule 1: the table goes to stdout, progress to stderr.
Rule 2: what was measured is written, even if a later part fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import settings
from benchmarks.embeddings import Reference, make_texts
from benchmarks.machine import has_gpu, read_machine
from benchmarks.models import DTYPES, EMBEDDED, SHAPES, embedded_gguf, prepare_pair
from benchmarks.report import REFERENCE, SPECULATION, describe, render
from benchmarks.rounds import Contestant, HttpContestant, Results, Schedule, alone, measure_rounds, medians
from benchmarks.scenarios import Figures, scenarios
from benchmarks.servers import (
    COMMANDS,
    LLAMA,
    OURS,
    PROGRAMS,
    ROOT,
    ServerFailed,
    Weights,
    available,
    child_environment,
    running,
)
from benchmarks.settings import RAW, Sizes
from benchmarks.worker import Worker
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.errors import SourceInvalid

RESULTS = Path(__file__).parent / "results"
WARM_UP_LIMIT = 600.0  # seconds
REFERENCE_BATCH = 32


class RawContestant:
    """The engines in-process, in a process of their own. part: RAW or RAW_MLX_LM."""

    def __init__(self, worker: Worker, part: str, scenarios: Collection[str]) -> None:
        self.part, self.scenarios, self._worker = part, scenarios, worker
        self.pause, self.resume = worker.pause, worker.resume

    def measure(self, scenario: str, number: int, limit: float) -> Figures:
        """The figures of a round."""
        figures: Figures = self._worker.ask([self.part, scenario, number], limit)
        return figures


class ReferenceContestant:
    """sentence-transformers of another environment, in the scenario of embeddings."""

    part, scenarios = REFERENCE, ("embeddings",)

    def __init__(self, reference: Reference, texts: int) -> None:
        self._reference = reference
        self._texts, self._tokens = make_texts(sources.resolve("embedded:minilm"), texts)
        self.pause, self.resume = reference.pause, reference.resume

    def measure(self, scenario: str, number: int, limit: float) -> Figures:
        """The figures of a round."""
        if number == 0:
            self._reference.seconds(self._texts, limit)
        return {"tokens_per_second": self._tokens / self._reference.seconds(self._texts, limit)}


def read_arguments(argv: Sequence[str] | None, gpu: bool) -> argparse.Namespace:
    """Parse the command line. Defaults depend on the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=[EMBEDDED, *SHAPES], default="1b" if gpu else EMBEDDED)
    add("--dtype", choices=DTYPES, default="bfloat16" if gpu else "float32")
    add("--quick", action="store_true", help="small counts: whether it works, not how fast it is")
    add("--full", action="store_true", help="all scenarios; without it those that have a target, and few more")
    add("--only", action="append", metavar="NAME", help='scenario, as in "sampled c=4", "agent session"')
    add("--server", action="append", choices=[*COMMANDS], help="measure only this one (and the raw engine)")
    add("--rounds", type=int, default=3, metavar="N", help="of all scenarios")
    add("--limit", type=float, default=90.0, metavar="S", help="most seconds of a scenario on one server")
    add("--minutes", type=float, default=15.0, metavar="M", help="after which no scenario begins")
    add("--reference", default=os.environ.get("REFERENCE_PYTHON"), metavar="PYTHON",
        help="interpreter of an environment with sentence-transformers ($REFERENCE_PYTHON)")  # fmt: skip
    add("--add", type=Path, action="append", default=[], metavar="FILE",
        help="JSON of another measurement, as of benchmarks.speculation, for the same table")  # fmt: skip
    add("--tokenizer", type=Path, metavar="DIR", help="where random models take their tokenizer from")
    add("--work", type=Path, default=ROOT / "build" / "benchmarks", metavar="DIR", help="where models are made")
    add("--out", type=Path, metavar="FILE", help="JSON file of the results")
    for name, kind in settings.Sizes.__annotations__.items():
        if kind == "int":
            add(f"--{name.replace('_', '-')}", type=int, metavar="N")
    add("--concurrency", type=lambda text: tuple(map(int, text.split(","))), metavar="N,N", help="ascending")
    return parser.parse_args(argv)


def choose_sizes(arguments: argparse.Namespace, gpu: bool) -> Sizes:
    """The sizes of the device, with the command line's changes."""
    sizes = settings.QUICK if arguments.quick else settings.GPU if gpu else settings.CPU
    if arguments.shape == "8b" and not arguments.quick:
        sizes = replace(sizes, concurrency=tuple(n for n in sizes.concurrency if n <= 16))
    given = {name: value for name, value in vars(arguments).items() if name in asdict(sizes) and value is not None}
    return replace(sizes, **given)


def choose_scenarios(arguments: argparse.Namespace, sizes: Sizes) -> list[str]:
    """Names of the scenarios to measure, in their order. Raises SystemExit for one that does not exist."""
    known = {name: each.full for name, each in scenarios(sizes).items()}
    short = {name for names in settings.raw_scenarios(sizes, full=False).values() for name in names}
    for names in settings.raw_scenarios(sizes, full=True).values():
        known |= {name: name not in short for name in names if name not in known}
    for name in arguments.only or ():
        if name not in known:
            raise SystemExit(f"--only: {name!r} is not valid; expected one of: {', '.join(known)}")
    return [
        name
        for name, full in known.items()
        if (name in arguments.only if arguments.only else arguments.full or not full)
    ]


class Contestants:
    """All contestants of a run, which are started one after the other and stopped until they are measured."""

    def __init__(self, arguments: argparse.Namespace, sizes: Sizes, names: Collection[str], stack: ExitStack) -> None:
        self._arguments, self._sizes, self._names, self._stack = arguments, sizes, names, stack
        pair = prepare_pair(arguments.shape, arguments.dtype, arguments.work.resolve(), arguments.tokenizer)
        self._servers = [name for name in arguments.server or available() if name in available()]
        gguf = embedded_gguf() if LLAMA in self._servers else None
        self._weights = Weights(
            pair, sizes.peak, gguf, embedding=_embedding_source() if "embeddings" in names else None
        )
        self.started: list[Contestant] = []

    def start(self) -> None:
        """Start all that can be started; what can not is reported."""
        for name in PROGRAMS:
            if name not in available():
                _report(f"{name}: not found, its rows are left out")
        for name in self._servers:
            self._try(name, lambda name=name: self._start_server(name))  # type: ignore[misc]
        if parts := self._raw_parts():
            self._try(RAW, lambda: self._start_raw(parts))
        if self._arguments.reference and "embeddings" in self._names and OURS in self._servers:
            self._try(REFERENCE, self._start_reference)
        elif "embeddings" in self._names:
            _report(f"{REFERENCE}: no --reference, its row is left out")

    def _try(self, name: str, start: Any) -> None:
        begun = perf_counter()
        try:
            start()
        except (ServerFailed, TimeoutError, OSError, RuntimeError, ValueError) as error:
            _report(
                "\n".join([f"{name}: does not start, its rows are left out: {error}", *getattr(error, "__notes__", ())])
            )
        else:
            _report(f"{name}: started in {perf_counter() - begun:.0f} s")

    def _start_server(self, name: str) -> None:
        server = self._stack.enter_context(running(name, self._weights))
        contestant = HttpContestant(server, self._weights.pair[0], self._sizes, scenarios(self._sizes))
        with alone(contestant):
            contestant.warm_up(WARM_UP_LIMIT)
        self.started.append(contestant)

    def _raw_parts(self) -> dict[str, list[str]]:
        """The scenarios of the raw engines by part, where there are any."""
        offered = settings.raw_scenarios(self._sizes, full=self._arguments.full or bool(self._arguments.only))
        if OURS not in self._servers:
            return {}
        wanted = {part: [name for name in names if name in self._names] for part, names in offered.items()}
        return {part: names for part, names in wanted.items() if names}

    def _start_raw(self, parts: Mapping[str, Collection[str]]) -> None:
        sizes = json.dumps(asdict(self._sizes))
        command = [sys.executable, "-m", "benchmarks.raw", "--model", str(self._weights.pair[0]), "--sizes", sizes]
        worker = self._keep(Worker(RAW, command, child_environment()))
        self.started += [RawContestant(worker, part, wanted) for part, wanted in parts.items()]

    def _start_reference(self) -> None:
        model = sources.resolve("embedded:minilm")
        reference = Reference(self._arguments.reference, model, REFERENCE_BATCH)
        self._keep(reference)
        self.started.append(ReferenceContestant(reference, self._sizes.texts))

    def _keep(self, worker: Worker) -> Worker:
        self._stack.callback(worker.close)
        worker.pause()
        return worker


def run(arguments: argparse.Namespace, sizes: Sizes, names: Sequence[str], rounds: list[Results]) -> None:
    """Measure, and put results into rounds one by one."""
    begun = perf_counter()
    with ExitStack() as stack:
        contestants = Contestants(arguments, sizes, names, stack)
        contestants.start()
        schedule = Schedule(arguments.rounds, arguments.limit, begun + arguments.minutes * 60)
        measure_rounds(contestants.started, names, rounds, schedule, _report)


def add_results(files: Sequence[Path], rounds: list[Results]) -> None:
    """Put the results of other measurements into each round: of this one, or of benchmarks.speculation."""
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        for part, figures in (content.get("results") or {SPECULATION: content["figures"]}).items():
            for results in rounds:
                results[part] = figures


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no stopped server stays behind
    gpu = has_gpu()
    arguments = read_arguments(argv, gpu)
    sizes = choose_sizes(arguments, gpu)
    names, begun = choose_scenarios(arguments, sizes), perf_counter()
    model = {"shape": arguments.shape, "dtype": arguments.dtype}
    samplings = {"greedy": settings.GREEDY, "sampled": settings.SAMPLED}
    rounds: list[Results] = []
    content: dict[str, Any] = {
        "machine": read_machine(),
        "settings": {"model": model, "sizes": asdict(sizes), "sampling": samplings},
        "rounds": rounds,
    }
    name = f"{arguments.shape}-{arguments.dtype}-{'gpu' if gpu else 'cpu'}{'-quick' if arguments.quick else ''}.json"
    out = arguments.out or RESULTS / name
    try:
        run(arguments, sizes, names, rounds)
        add_results(arguments.add, rounds)
    finally:
        content["results"] = medians(rounds)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    what = f"{arguments.shape} in {arguments.dtype}, {len(rounds)} rounds, {perf_counter() - begun:.0f} s"
    print(f"{what}; {describe(content['machine'])}\n\n{render(content)}")
    _report(f"written to {out}")


def _embedding_source() -> str | None:
    """What our server calls the embedded embedding model; None if it is not installed."""
    source = "embedded:minilm"
    try:
        sources.resolve(source)
    except SourceInvalid as error:
        _report(f"embeddings: left out: {error}")
        return None
    return source


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
