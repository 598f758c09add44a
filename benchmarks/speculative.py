"""Gain of speculative decoding: the cost of its parts, and the acceptance rate at which it breaks even.

Run: python -m benchmarks.speculative [--target 8b] [--draft 1b] [--dtype bfloat16]. One stream, greedy, on the device.

A round drafts k tokens one by one and verifies them in one step of the target. If a is the probability that a drafted
token is accepted, a round yields (1 - a^(k+1)) / (1 - a) tokens on average (Leviathan et al., 2023, arXiv:2211.17192).
The acceptance rate depends on two real models and is not measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from mlxserver.engine.mlx import mx

from mlx_lm import load
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from benchmarks.machine import has_gpu, read_machine
from benchmarks.models import EMBEDDED, SHAPES, embedded_directory
from benchmarks.servers import ROOT

PROMPT_TOKENS = 256
STEPS, WARM_UP = 40, 8
DRAFTED = (2, 4, 8)
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)


def make_model(shape: str, dtype: str) -> Any:
    """A model of a shape with random weights, or the embedded one."""
    if shape == EMBEDDED:
        return load(str(embedded_directory(ROOT / "build" / "benchmarks", dtype)))[0]
    model = llama.Model(llama.ModelArgs.from_dict(SHAPES[shape].config()))
    model.set_dtype(getattr(mx, dtype))
    model.eval()
    mx.eval(model.parameters())
    return model


def step_seconds(model: Any, tokens: int) -> float:
    """Median seconds of a greedy step over `tokens` tokens at once behind a prompt, each evaluated before the next."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, PROMPT_TOKENS), dtype=mx.uint32), cache=cache))
    chosen = mx.zeros((1, tokens), dtype=mx.uint32)
    times = []
    for _ in range(WARM_UP + STEPS):
        begun = perf_counter()
        chosen = mx.argmax(model(chosen, cache=cache), axis=-1)
        mx.eval(chosen)
        times.append(perf_counter() - begun)
        trim_prompt_cache(cache, tokens)
    return median(times[WARM_UP:])


def tokens_per_round(acceptance: float, drafted: int) -> float:
    """Tokens that a round yields on average."""
    return sum(acceptance**n for n in range(drafted + 1))


def break_even(cost: float, drafted: int) -> float | None:
    """Acceptance rate at which a round breaks even; None if it never does. cost: of a round, in steps of the target."""
    if cost >= drafted + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_round(middle, drafted) < cost else (low, middle)
    return high


def measure(target: str, draft: str, dtype: str) -> dict[str, Any]:
    """All figures: seconds, and ratios to one step of the target."""
    drafting = step_seconds(make_model(draft, dtype), 1)
    model = make_model(target, dtype)
    own = step_seconds(model, 1)
    rounds = []
    for drafted in DRAFTED:
        checking = step_seconds(model, drafted + 1)
        cost = (drafted * drafting + checking) / own
        speedups = {str(a): tokens_per_round(a, drafted) / cost for a in ACCEPTANCES}
        rounds.append({
            "drafted": drafted, "checking": checking, "break_even": break_even(cost, drafted), "speedup": speedups
        })  # fmt: skip
    return {"target": target, "draft": draft, "dtype": dtype, "step": own, "draft_step": drafting, "rounds": rounds}


def render(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    cells: Callable[[Sequence[object]], str] = lambda row: "| " + " | ".join(map(str, row)) + " |"  # noqa: E731
    head = ["drafted", "check, ms", "break-even acceptance", *(f"speed at {a}" for a in ACCEPTANCES)]
    lines = [cells(head), cells(["---:"] * len(head))]
    for each in figures["rounds"]:
        even = "never" if each["break_even"] is None else f"{each['break_even']:.2f}"
        speeds = [f"{speed:.2f}" for speed in each["speedup"].values()]
        lines.append(cells([each["drafted"], f"{each['checking'] * 1e3:.1f}", even, *speeds]))
    steps = f"target {figures['target']} step {figures['step'] * 1e3:.1f} ms, draft {figures['draft']} step "
    return f"{steps}{figures['draft_step'] * 1e3:.1f} ms, {figures['dtype']}\n\n" + "\n".join(lines)


def main() -> int:
    """Measure and print. --out writes the figures with the facts of the machine."""
    gpu = has_gpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [EMBEDDED, *SHAPES]
    parser.add_argument("--target", choices=names, default="8b" if gpu else EMBEDDED)
    parser.add_argument("--draft", choices=names, default="1b" if gpu else "small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.target, arguments.draft, arguments.dtype)
    print(render(figures))
    if arguments.out:
        content = {"machine": read_machine(), **figures}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
