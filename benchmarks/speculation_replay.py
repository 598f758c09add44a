"""Gain of speculation by prompt lookup on given texts, replayed without a model: what its decisions gain and lose.

Run: python -m benchmarks.speculation_replay [--costs 1.8 2.7 4.6] [--noise 0.3]. The tokenizer is the embedded model's.

A replay has the answers of benchmarks/speculation.py, edits and pages of prose in turn, and costs of verifying steps in
plain ones. It takes seconds, and no other process disturbs it. The gain is that of one sequence alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import abc
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
from mlxserver.engine.sequence import Sequence

LENGTHS = (120, 512)  # tokens of a page
ROUNDS, PAGES = 6, 4  # edits of a server, and the pages behind each


class Server:
    """Controller of one model, and its clock. costs: of steps that verify so many tokens. noise: of all durations."""

    def __init__(self, costs: abc.Mapping[int, float], noise: float, seed: int) -> None:
        self._costs = costs
        self._noise = noise
        self._random = random.Random(seed)
        self._controller = SpeculationController(ModelMetrics(""))
        self._drafts = Drafts(self._controller, None, is_forced=False)

    def gain(self, task: Task) -> float:
        """Tokens per plain step."""
        sequence = Sequence(1, task.prompt, SamplingParams(), len(task.answer))
        lookup, rates = PromptLookup(task.prompt), HitRates(self._controller.rates)
        running = RunningSequence(sequence, 0, 0.0, lookup=lookup, hit_rates=rates)
        seconds = 0.0
        while running.num_sampled < len(task.answer):
            plan = self._drafts.plan([running], lambda tokens: True)
            kept = 1
            if plan.tokens > 1:
                draft = lookup.draft(min(plan.tokens - 1, running.most_drafted))
                answer = task.answer[running.num_sampled :]
                right = next((n for n, (a, b) in enumerate(zip(draft, answer, strict=False)) if a != b), len(draft))
                seconds += self._costs[plan.tokens]
                self._controller.note_verified(1, plan, self._costs[plan.tokens] * self._disturbance())
                self._drafts.note([running], plan, [draft], [right], ())
                kept += right
            else:
                seconds += 1
                self._controller.note_plain(1, self._disturbance())
            for token in task.answer[running.num_sampled : running.num_sampled + kept]:
                self._drafts.add_credit(running)
                streak = lookup.streak
                if (is_hit := lookup.append(token)) is not None:
                    rates.note(streak, is_hit)
            running.num_sampled += kept
        return len(task.answer) / seconds

    def _disturbance(self) -> float:
        return self._random.uniform(1 - self._noise, 1 + self._noise)


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
    parser.add_argument("--noise", type=float, default=0.3, help="of a duration, relative to it")
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(Path(embedded_directory(ROOT / "build" / "benchmarks", "float32")))
    costs = dict(zip(SIZES, arguments.costs, strict=True))
    print("| tokens of a page | edit | free text, mean | median | 10th percentile | worst |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in LENGTHS:
        edited, free = [], []
        for seed in range(arguments.seeds):
            server, rng = Server(costs, arguments.noise, seed), random.Random(seed)
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
