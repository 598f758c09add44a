"""Plan of a benchmark: models, prompts, levels of load, service objectives. Pure, except for reading prompts.

Rule: the same plan and seed send the same prompts in the same order at the same times.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxserver.client.api import Message
from mlxserver.client.errors import FileUnusable, SettingInvalid
from mlxserver.client.stats import Timing
from mlxserver.client.transcript import parse_json, read_text

Prompt = Sequence[Message]

PROMPTS = (
    "Explain in a few sentences how a rainbow forms.",
    "Write a short story about a lighthouse keeper.",
    "What are the advantages of learning a second language?",
    "Describe how bread is baked, step by step.",
    "List five animals that live in the sea, each with one fact.",
    "Why is the sky dark at night?",
    "Summarise the history of the bicycle.",
    "Give advice for planting a first garden.",
)


@dataclass(frozen=True, slots=True)
class Slo:
    """Service objectives in seconds, None for no limit. itl: mean time per token after the first."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    def is_met(self, timing: Timing) -> bool:
        """Whether a request meets all objectives. A figure that is not known meets none."""
        pairs = ((self.ttft, timing.ttft), (self.itl, timing.time_per_token), (self.e2e, timing.latency))
        return all(limit is None or (value is not None and value <= limit) for limit, value in pairs)


@dataclass(frozen=True, slots=True)
class Level:
    """Load on one model. concurrency: requests running at any time; or rate: mean arrivals per second."""

    model: str
    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """Name of the load in tables."""
        return f"c={self.concurrency}" if self.rate is None else f"{self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class Plan:
    """Whole benchmark. requests, warmup: counts per level. params: go into every request."""

    models: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    concurrency: tuple[int, ...] = (1, 4, 16)
    rates: tuple[float, ...] = ()
    requests: int = 32
    warmup: int = 2
    seed: int = 0
    slo: Slo | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Every model at every load; rates replace concurrency."""
        if self.rates:
            return tuple(Level(model, rate=rate) for model in self.models for rate in self.rates)
        return tuple(Level(model, concurrency=count) for model in self.models for count in self.concurrency)

    def questions(self) -> list[Prompt]:
        """The prompts of one level in their order: all of them before any is repeated."""
        generator, order = random.Random(self.seed), list[Prompt]()
        while len(order) < self.requests:
            order += generator.sample(self.prompts, len(self.prompts))
        return order[: self.requests]

    def arrivals(self, rate: float) -> list[float]:
        """When each request of a level is sent, in seconds from the level's start: a Poisson process."""
        generator, at = random.Random(self.seed), 0.0
        return [at := at + generator.expovariate(rate) for _ in range(self.requests)]


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read the prompts of a file: per line an object with messages or a prompt if it ends in .jsonl, else a text.

    Raises FileUnusable.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    is_jsonl = path.suffix.lower() == ".jsonl"
    prompts = tuple(
        _json_prompt(path, number, line) if is_jsonl else user(line) for number, line in enumerate(lines, 1)
    )
    if not prompts:
        raise FileUnusable(str(path), "it has no prompt")
    return prompts


def user(text: str) -> Prompt:
    """A prompt of one user message."""
    return ({"role": "user", "content": text},)


def parse_slo(text: str) -> Slo:
    """Parse objectives in milliseconds, such as "ttft=500,itl=50". Raises SettingInvalid."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            limits[name] = float(value) / 1000
        except ValueError:
            limits[name] = -1.0
        if name not in ("ttft", "itl", "e2e") or not 0 < limits[name] < float("inf"):
            raise SettingInvalid("slo", text, 'milliseconds such as "ttft=500,itl=50,e2e=5000"')
    return Slo(**limits)


def _json_prompt(path: Path, number: int, line: str) -> Prompt:
    try:
        value = json.loads(line)
        if isinstance(value, dict) and isinstance(value.get("prompt"), str):
            return user(value["prompt"])
        return parse_json(line).messages
    except (ValueError, RecursionError) as error:
        expected = 'expected {"messages": [...]} or {"prompt": "..."} on each line'
        raise FileUnusable(str(path), f"prompt {number}: {expected}") from error
