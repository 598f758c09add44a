"""Rounds of a measurement: each scenario on each contestant in turn, which is then alone on the machine.

Rule 1: all contestants but one are stopped (SIGSTOP) while that one is measured.
Rule 2: every other round has the contestants in reverse order, so that a machine that slows down slows all of them.
Rule 3: what fails or takes too long once is left out of the rounds behind it, and reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Protocol

from benchmarks.load import run_one, target
from benchmarks.scenarios import Bench, Figures, Scenario
from benchmarks.servers import EMBEDDING, Server, ServerFailed
from benchmarks.settings import Sizes
from benchmarks.vocabulary import Prompts

Results = dict[str, dict[str, Figures]]  # by part, scenario and name


@dataclass(frozen=True, slots=True)
class Schedule:
    """Number of rounds, seconds for one scenario of a contestant, and the time after which no scenario begins."""

    rounds: int
    limit: float
    deadline: float


class Contestant(Protocol):
    """What is measured beside others. part: its name in the results. scenarios: those that it takes part in."""

    @property
    def part(self) -> str:
        """Name in the results."""

    @property
    def scenarios(self) -> Collection[str]:
        """Names of the scenarios that it takes part in."""

    def measure(self, scenario: str, number: int, limit: float) -> Figures:
        """The figures of a round. Raises TimeoutError, ServerFailed, RuntimeError or ValueError."""

    def pause(self) -> None:
        """Stop."""

    def resume(self) -> None:
        """Go on."""


class HttpContestant:
    """A running server, in the scenarios whose models it has."""

    def __init__(self, server: Server, directory: Path, sizes: Sizes, scenarios: Mapping[str, Scenario]) -> None:
        self._server, self._directory, self._sizes = server, directory, sizes
        roles = server.models.keys()
        self._scenarios = {name: each for name, each in scenarios.items() if each.takes(server.name, roles)}
        self.part = server.name
        self.pause, self.resume = server.pause, server.resume

    @property
    def scenarios(self) -> Collection[str]:
        """Names of the scenarios that it takes part in."""
        return self._scenarios.keys()

    def measure(self, scenario: str, number: int, limit: float) -> Figures:
        """The figures of a round."""
        return asyncio.run(self._measure(f"{scenario} {number}", number, self._scenarios[scenario].run, limit))

    def warm_up(self, limit: float) -> None:
        """Load all models by a short request to each."""

        async def ask(bench: Bench) -> Figures:
            for role, model in self._server.models.items():
                if role != EMBEDDING:
                    await run_one(bench.request(model, 8, 2))
            return {}

        asyncio.run(self._measure("warm-up", 0, ask, limit))

    async def _measure(self, name: str, number: int, run: Callable[[Bench], object], limit: float) -> Figures:
        prompts = Prompts(self._directory, name)
        async with asyncio.timeout(limit), target(self._server.port, self._server.connect_interval) as under_load:
            bench = Bench(under_load, self._server.models, prompts, self._sizes, self._server.port, number == 0)
            return await run(bench)  # type: ignore[misc, no-any-return]


@contextmanager
def alone(contestant: Contestant) -> Iterator[None]:
    """Let one of the stopped contestants run."""
    contestant.resume()
    try:
        yield
    finally:
        contestant.pause()


def measure_rounds(
    contestants: Sequence[Contestant],
    scenarios: Sequence[str],
    rounds: list[Results],
    schedule: Schedule,
    report: Callable[[str], None],
) -> None:
    """Put the results of all rounds into rounds, one by one. report: called with a line of progress."""
    left_out: set[tuple[str, str]] = set()
    limit = schedule.limit
    for number in range(schedule.rounds):
        rounds.append({})
        for scenario in scenarios:
            for contestant in contestants[:: -1 if number % 2 else 1]:
                key = contestant.part, scenario
                if scenario not in contestant.scenarios or key in left_out:
                    continue
                if (begun := perf_counter()) > schedule.deadline:
                    report("the time is over: what is measured so far counts")
                    return
                try:
                    with alone(contestant):
                        figures = contestant.measure(scenario, number, limit)
                except TimeoutError:
                    left_out.add(key)
                    report(f"{contestant.part}, {scenario}: left out, it takes more than {limit:g} s")
                except (ServerFailed, RuntimeError, ValueError, OSError) as error:
                    left_out.add(key)
                    report(f"{contestant.part}, {scenario}: left out: {error}")
                else:
                    rounds[-1].setdefault(contestant.part, {})[scenario] = figures
                    report(f"round {number + 1}: {scenario}, {contestant.part}: {perf_counter() - begun:.0f} s")


def medians(rounds: Sequence[Results]) -> Results:
    """The medians of all figures over the rounds that have them; those that are NaN are left out."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for results in rounds:
        for part, scenarios in results.items():
            for scenario, figures in scenarios.items():
                for name, value in figures.items():
                    if not isnan(value):
                        found.setdefault((part, scenario, name), []).append(value)
    middle: Results = {}
    for (part, scenario, name), values in found.items():
        middle.setdefault(part, {}).setdefault(scenario, {})[name] = median(values)
    return middle
