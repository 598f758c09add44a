"""Gain of speculation: tokens per second with it and without, of an edit and of free text, in-process.

Run: python -m benchmarks.speculation [--model smollm2] [--clients 1]. Weights may be random: the answers are given.

--compiled has a GPU's padded slots and compiled steps wherever it runs; on a CPU it is for a try: shapes cost seconds.

--draft DIRECTORY adds a draft model of the same vocabulary. How often it is right is as it knows these texts.
--draft self is the model itself, which costs the most.

An edit is a prompt with a source file of some 1,000 tokens, and an answer that has the file again with one change. Free
text is a page of prose that goes on behind its beginning. The sampler does its work, and its tokens are replaced by
those of the answer: steps cost what they cost, and as many drafted tokens are accepted as if a model had written this.

Rule 1: both settings take turns within one run, and keep what they have measured, as a server does.
Rule 2: before, the shapes of both are warmed up as a server does in idle moments; the first round of each does not
        count.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import abc
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import loader  # first: this prepares the process for MLX

# isort: split
from mlxserver.engine.mlx import mx

from mlx_lm.utils import load_tokenizer

from benchmarks.machine import has_gpu, read_machine
from benchmarks.models import EMBEDDED, SHAPES, embedded_directory, prepare_pair
from benchmarks.servers import ROOT
from mlxserver.engine.kv_cache.classes import capacity_for
from mlxserver.engine.loading.loader import LoadedModel
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.scheduler.drafter import DraftModel
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.scheduler.speculation import Setting
from mlxserver.engine.scheduler.speculation_controller import SIZES
from mlxserver.engine.sequence import Sequence

FILE, PAGE = ROOT / "mlxserver" / "engine" / "worker" / "tracker.py", ROOT / "docs" / "memory.md"
FILE_TOKENS, PAGE_TOKENS, PAGE_PROMPT = 1000, 512, 256
SETTINGS: tuple[Setting, ...] = ("off", "auto")


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and its answer, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one round. accepted: share of the answers' tokens that were drafted and accepted."""

    tokens_per_second: float
    drafted: float
    accepted: float


class GivenTokens(BatchSampler):
    """Samples as ever, and answers with given tokens. answers: by sequence id."""

    def __init__(self, vocab_size: int, answers: abc.Mapping[int, abc.Sequence[int]]) -> None:
        super().__init__(vocab_size)
        self._answers = answers
        self._rows: list[list[int]] = []  # sequence id, and its number of sampled tokens

    def extend(self, sequences: abc.Sequence[Sequence]) -> None:
        """Add sequences."""
        super().extend(sequences)
        self._rows += [[sequence.id, sequence.num_generated] for sequence in sequences]

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Keep only the sequences at these indices."""
        super().filter(keep)
        self._rows = [self._rows[index] for index in keep]

    def rewind(self, sampled: mx.array, kept: abc.Sequence[int]) -> None:
        """Take the last calls back."""
        super().rewind(sampled, kept)
        for row, count in zip(self._rows, kept, strict=True):
            row[1] -= sampled.shape[1] - count

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """The next token of each answer, or its next tokens, once as many are sampled."""
        sampled = super().__call__(logits, allowed)
        positions = sampled.shape[1] if sampled.ndim > 1 else 1
        given = [self._given(id, count, positions) for id, count in self._rows]
        for row in self._rows:
            row[1] += positions
        tokens: mx.array = mx.depends(mx.array(given, dtype=mx.uint32).reshape(sampled.shape), sampled)
        return tokens

    def _given(self, id: int, start: int, count: int) -> list[int]:
        """Tokens of an answer from one on, and zeros behind its end."""
        own = [*self._answers.get(id, ())[start : start + count]]
        return own + [0] * (count - len(own))


class Bench:
    """One scheduler of a model under one setting."""

    def __init__(
        self, model: Any, setting: Setting, clients: int, draft: DraftModel | None, policy: ExecutionPolicy
    ) -> None:
        self._metrics = ModelMetrics("")
        self._answers: dict[int, abc.Sequence[int]] = {}
        self._scheduler = Scheduler(
            model,
            max_running=clients,
            metrics=self._metrics,
            make_sampler=lambda vocab_size: GivenTokens(vocab_size, self._answers),
            policy=policy,
            speculation=setting,
            draft=draft if setting != "off" else None,
        )

    def warm_up(self, longest: int) -> int:
        """Compute the shapes of sequences of so many tokens. Returns the number of shapes."""
        return sum(1 for _ in self._scheduler.warm_up(longest))

    def round(self, tasks: abc.Sequence[Task], sampling: SamplingParams) -> Figures:
        """Decode the answers together. The time begins with the first token of all."""
        left = {n: len(task.answer) for n, task in enumerate(tasks)}
        self._answers.update({n: task.answer for n, task in enumerate(tasks)})
        drafted, accepted = self._metrics.drafted_tokens, self._metrics.accepted_tokens
        for n, task in enumerate(tasks):
            self._scheduler.insert([Sequence(n, task.prompt, sampling, len(task.answer))])
        started: float | None = None
        while left:
            for token in self._scheduler.decode():
                if started is None:
                    started = perf_counter()
                assert token.token == tasks[token.sequence_id].answer[-left[token.sequence_id]]
                left[token.sequence_id] -= 1
            gone = [n for n, count in left.items() if not count]
            self._scheduler.remove(gone)
            left = {n: count for n, count in left.items() if count}
            self._scheduler.prefill()
        count = sum(len(task.answer) for task in tasks)
        assert started is not None
        return Figures(
            count / (perf_counter() - started),
            (self._metrics.drafted_tokens - drafted) / count,
            (self._metrics.accepted_tokens - accepted) / count,
        )


def edits(tokenizer: Any, clients: int, file_tokens: int) -> list[Task]:
    """A file each, with a change in the middle of it."""
    file = tokenizer.encode(FILE.read_text(encoding="utf-8"))[:file_tokens]
    tasks = []
    for n in range(clients):
        asked = tokenizer.encode(f"Rename the variable in the middle to value_{n}. Give the whole file back.\n")
        change = tokenizer.encode(f" value_{n}: int = {n}")
        middle = len(file) // 2 + n
        tasks.append(Task(tuple(asked + file), tuple(file[:middle] + change + file[middle + 3 :])))
    return tasks


def free_texts(tokenizer: Any, clients: int, page_tokens: int) -> list[Task]:
    """The page each, from another token on."""
    page = tokenizer.encode(PAGE.read_text(encoding="utf-8"))
    starts = [n * 37 for n in range(clients)]
    return [
        Task(
            tuple(page[start : start + PAGE_PROMPT]),
            tuple(page[start + PAGE_PROMPT : start + PAGE_PROMPT + page_tokens]),
        )
        for start in starts
    ]


def draft_model(source: str, target: LoadedModel) -> DraftModel:
    """The draft model in a directory, or the target itself."""
    loaded = target if source == "self" else loader.load(ModelSpec("draft", source))
    return DraftModel("draft", loaded.model, loaded.context_length, loaded.weight_bytes, current())


def measure(
    model: Any, tokenizer: Any, arguments: argparse.Namespace, draft: DraftModel | None = None
) -> dict[str, Any]:
    """All figures, by task."""
    sampling = SamplingParams(temperature=arguments.temperature, top_p=0.9, seed=1)
    policy = compiled(current()) if arguments.compiled else current()
    benches = {setting: Bench(model, setting, arguments.clients, draft, policy) for setting in SETTINGS}
    tasks = {
        "edit": edits(tokenizer, arguments.clients, arguments.file_tokens),
        "free text": free_texts(tokenizer, arguments.clients, arguments.page_tokens),
    }
    longest = max(len(task.prompt) + len(task.answer) for own in tasks.values() for task in own)
    for setting, bench in benches.items():
        started = perf_counter()
        shapes = bench.warm_up(capacity_for(longest + SIZES[-1]))
        print(f"{setting}: {shapes} shapes warmed up in {perf_counter() - started:.1f} s", file=sys.stderr)
    rounds: dict[str, dict[str, list[Figures]]] = {name: {setting: [] for setting in SETTINGS} for name in tasks}
    for _ in range(arguments.rounds + 1):
        for name, own in tasks.items():
            for setting in SETTINGS:
                rounds[name][setting].append(benches[setting].round(own, sampling))
    return {name: _summary(**{setting: own[1:] for setting, own in by.items()}) for name, by in rounds.items()}


def compiled(policy: ExecutionPolicy) -> ExecutionPolicy:
    """A policy with a GPU's compiled steps, whose shapes are warmed up."""
    return replace(policy, pad_slots=True, bucket_prefill=True, compile_steps=True, warm_up_all_batch_sizes=True)


def _summary(off: abc.Sequence[Figures], auto: abc.Sequence[Figures]) -> dict[str, float]:
    """Medians of the rounds; the ratio is that of rounds next to each other."""
    ratios = [one.tokens_per_second / other.tokens_per_second for one, other in zip(auto, off, strict=True)]
    return {
        "off": median(own.tokens_per_second for own in off),
        "auto": median(own.tokens_per_second for own in auto),
        "ratio": median(ratios),
        "drafted": median(own.drafted for own in auto),
        "accepted": median(own.accepted for own in auto),
    }


def render(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| | tokens/s off | auto | ratio | drafted per token | accepted per token |", "| --- |" + " ---: |" * 5]
    for name, own in figures.items():
        cells = [f"{own['off']:.1f}", f"{own['auto']:.1f}", f"{own['ratio']:.2f}"]
        cells += [f"{own['drafted']:.2f}", f"{own['accepted']:.2f}"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print. --out writes the figures with the facts of the machine."""
    gpu = has_gpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[EMBEDDED, *SHAPES], default="1b" if gpu else EMBEDDED)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "4bit"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer, in place of the embedded model's")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--file-tokens", type=int, default=FILE_TOKENS)
    parser.add_argument("--page-tokens", type=int, default=PAGE_TOKENS)
    parser.add_argument("--compiled", action="store_true", help="steps are compiled, as on CUDA")
    parser.add_argument("--draft", help="directory of a draft model, or self")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work = ROOT / "build" / "benchmarks"
    directory, _ = prepare_pair(arguments.model, arguments.dtype, work, arguments.tokenizer)
    texts = load_tokenizer(arguments.tokenizer or embedded_directory(work, "float32"))
    loaded = loader.load(ModelSpec("speculation", str(directory)))
    draft = draft_model(arguments.draft, loaded) if arguments.draft else None
    figures = measure(loaded.model, texts, arguments, draft)
    print(render(figures))
    if arguments.out:
        content = {"machine": read_machine(), "arguments": {**vars(arguments), "out": None, "tokenizer": None}}
        arguments.out.write_text(json.dumps({**content, "figures": figures}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
