"""Gain of speculation by prompt lookup on given texts, replayed without a model: what its decisions gain and lose.

Run: python -m benchmarks.speculation_replay [--costs 1.8 2.7 4.6] [--break-cost 0] [--noise 0.3]. The tokenizer is the
embedded model's. An H200 with a model of 1B: --costs 1.43 1.43 1.5 --break-cost 0.7 --noise 0.1

A replay has the answers of benchmarks/speculation.py, edits and pages of prose in turn, and costs of verifying steps
and of breaks of the pipeline in plain steps. It takes seconds, and no other process disturbs it. The gain is that of
one sequence alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import abc
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.models import embedded_directory
from benchmarks.servers import ROOT
from benchmarks.speculation import FILE_TOKENS, PAGE_PROMPT, Task, edits
from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.scheduler.drafts import Drafts
from mlxserver.engine.scheduler.hit_rates import HitRates
from mlxserver.engine.scheduler.prompt_lookup import PromptLookup
from mlxserver.engine.scheduler.running import RunningSequence
from mlxserver.engine.scheduler.speculation_controller import SIZES, SpeculationController
from mlxserver.engine.scheduler.step_costs import PLAIN, Plan
from mlxserver.engine.sequence import Sequence

LENGTHS = (120, 512)  # tokens of a page
ROUNDS, PAGES = 6, 4  # edits of a server, and the pages behind each


@dataclass(frozen=True, slots=True)
class Times:
    """Durations in plain steps. verifying: of steps that verify so many tokens. broken: what a break of the pipeline
    costs. noise: of what is measured, relative to it.
    """

    verifying: abc.Mapping[int, float]
    broken: float
    noise: float


class Server:
    """Controller of one model, and its clock."""

    def __init__(self, times: Times, seed: int) -> None:
        self._times = times
        self._random = random.Random(seed)
        self.controller = SpeculationController(ModelMetrics(""))
        self.drafts = Drafts(self.controller, None, is_forced=False)

    def gain(self, task: Task) -> float:
        """Tokens per plain step."""
        answer = Answer(self, task)
        seconds, is_read = 0.0, True
        while answer.running.num_sampled < len(task.answer):
            promising = [] if is_read else answer.promising()
            if is_read or promising:
                answer.read()
                plan = answer.plan()
                if promising:
                    seconds += self._times.broken
                    self.controller.costs(1).note_breaks(1, self._measured(2 + self._times.broken))
                    self.drafts.note_break(promising, 1)
                is_read = plan.tokens > 1
            else:
                plan, is_read = PLAIN, False
                self.controller.costs(1).note_plain(self._measured(1))
            taken = self._times.verifying.get(plan.tokens, 1.0)
            if is_read:
                self.controller.note_verified(1, plan, self._measured(taken))
            seconds += taken
            answer.advance(plan)
        return len(task.answer) / seconds

    def _measured(self, seconds: float) -> float:
        return seconds * self._random.uniform(1 - self._times.noise, 1 + self._times.noise)


class Answer:
    """An answer that a server generates."""

    def __init__(self, server: Server, task: Task) -> None:
        self._server = server
        self._answer = task.answer
        self._lookup, rates = PromptLookup(task.prompt), HitRates(server.controller.rates)
        sequence = Sequence(1, task.prompt, SamplingParams(), len(task.answer))
        self.running = RunningSequence(sequence, 0, 0.0, lookup=self._lookup, hit_rates=rates)

    def promising(self) -> list[RunningSequence]:
        """The sequence, if its drafts are worth a break of the pipeline."""
        plan = self._server.drafts.plan([self.running], _fits, is_pending=True)
        return [self.running] if plan.tokens > 1 else []

    def read(self) -> None:
        """Read the tokens that are sampled."""
        for token in self._answer[len(self._lookup) - len(self.running.sequence.tokens) : self.running.num_sampled]:
            self._server.drafts.follow(self.running, token)

    def plan(self) -> Plan:
        """Plan of the next step."""
        return self._server.drafts.plan([self.running], _fits)

    def advance(self, plan: Plan) -> None:
        """Sample what such a step does. A plain one reads the tokens before."""
        right = 0
        if plan.tokens > 1:
            draft = self._lookup.draft(min(plan.tokens - 1, self.running.most_drafted))
            rest = self._answer[self.running.num_sampled :]
            right = next((n for n, (a, b) in enumerate(zip(draft, rest, strict=False)) if a != b), len(draft))
            self._server.drafts.note([self.running], plan, [draft], [right], ())
        self.read()
        self.running.num_sampled += right + 1


def _fits(tokens: int) -> bool:
    return True


def pages(tokenizer: Any, length: int, rng: random.Random) -> list[Task]:
    """A part of each page of the documentation, that goes on behind its beginning."""
    tasks = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        page = tokenizer.encode(path.read_text(encoding="utf-8"))
        if (last := len(page) - PAGE_PROMPT - length) >= 0:
            start = rng.randrange(last + 1)
            middle = start + PAGE_PROMPT
            tasks.append(Task(tuple(page[start:middle]), tuple(page[middle : middle + length])))
    return tasks


def main() -> int:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=float, nargs=len(SIZES), default=(1.8, 2.7, 4.6), help="in plain steps")
    parser.add_argument("--break-cost", type=float, default=0.0, help="in plain steps")
    parser.add_argument("--noise", type=float, default=0.3, help="of a duration, relative to it")
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(Path(embedded_directory(ROOT / "build" / "benchmarks", "float32")))
    times = Times(dict(zip(SIZES, arguments.costs, strict=True)), arguments.break_cost, arguments.noise)
    print("| tokens of a page | edit | free text, mean | median | 10th percentile | worst |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in LENGTHS:
        edited, free = [], []
        for seed in range(arguments.seeds):
            server, rng = Server(times, seed), random.Random(seed)
            tasks = pages(tokenizer, length, rng)
            for edit in edits(tokenizer, ROUNDS, FILE_TOKENS):
                edited.append(server.gain(edit))
                free += [server.gain(task) for task in rng.sample(tasks, PAGES)]
        free.sort()
        worst = [mean(free), free[len(free) // 2], free[len(free) // 10], free[0]]
        print(f"| {length} | {mean(edited):.2f} | " + " | ".join(f"{own:.3f}" for own in worst) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
