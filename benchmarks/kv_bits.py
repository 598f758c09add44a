"""Quantised KV cache: bytes per token, speed, and how far greedy answers agree with those of the cache as computed.

Run: python -m benchmarks.kv_bits [--model smollm2] [--only agreement|speed] [--length 1024] [--streams 1 8].
A shape of random weights (benchmarks/models.py) has bytes and speed; agreement needs the embedded SmolLM2.

Rule 1: all formats run in one process with the same weights, in turns, so that a slower minute slows all of them.
Rule 2: bytes per token are measured, as the growth of the device's memory when a sequence joins a batch.
Rule 3: agreement counts tokens up to the end of the answer as computed. "next token" is the share of its tokens that a
        quantised cache gives too, each behind the same tokens before it; "prefix" is the share of it up to the first
        difference, "whole" that of answers without one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

from mlxserver.engine.mlx import mx

from benchmarks.machine import read_machine
from benchmarks.models import EMBEDDED, SHAPES
from benchmarks.speculative import make_model
from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine import sequence
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.batched import make_batch_cache
from mlxserver.engine.kv_cache.quantized import KVFormat
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.kv_format import quantize_kv
from mlxserver.engine.loading.sources import silent
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import current
from mlxserver.engine.scheduler.scheduler import Scheduler

FORMATS = (None, 8, 4)
GROUP_SIZE = 64
ANSWER = 64  # tokens
WARM_UP, STEPS, ROUNDS = 4, 24, 5
SUBJECTS = (
    "the sea", "a volcano", "bread", "the moon", "a library", "chess", "the heart", "rain", "a bridge", "honey"
)  # fmt: skip
TASKS = (
    "What is {}? Answer in two sentences.",
    "Write a short poem about {}.",
    "List five words that go with {}.",
    "Explain {} to a child.",
    "Tell me a surprising fact about {}.",
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares of the answers as computed, from 0 to 1 (rule 3)."""

    prompts: int
    next_token: float
    prefix: float
    whole: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second. decode: of all streams together, by their number."""

    prefill: float
    decode: dict[int, float]


def set_format(model: Any, bits: int | None) -> None:
    """Have the model keep its KV cache in so many bits, or as computed."""
    caches.set_kv_format(model, None)
    quantize_kv(model, KVFormat(bits, GROUP_SIZE) if bits else None)


def bytes_per_token(model: Any, length: int) -> float:
    """Growth of the device's memory by a sequence of so many tokens, per token that its slot has room for."""
    batch: Any = make_batch_cache(model)
    cache = caches.new_cache(model)
    model(mx.zeros((1, length), dtype=mx.uint32), cache=cache)
    mx.eval([layer.state for layer in cache])
    gc.collect()
    before = device.active_bytes()
    batch.join([cache])
    mx.eval(batch.advance(mx.zeros((1,), dtype=mx.uint32)))
    return (device.active_bytes() - before) / int(batch.held_tokens)


class Streams:
    """Streams behind a prompt of so many tokens, of one format of the cache."""

    def __init__(self, model: Any, bits: int | None, length: int, count: int) -> None:
        set_format(model, bits)
        self._batch = make_batch_cache(model)
        self._tokens = mx.zeros((count,), dtype=mx.uint32)
        prompt = mx.arange(length, dtype=mx.uint32)[None] % 1000
        cache = caches.new_cache(model)
        model(prompt, cache=cache)  # compiles what it has to
        cache = caches.new_cache(model)
        begun = perf_counter()
        for start in range(0, length, 256):
            model(prompt[:, start : start + 256], cache=cache)
            mx.eval([layer.state for layer in cache])
        self.prefill = length / (perf_counter() - begun)
        self._batch.join([cache] * count)
        self.steps(WARM_UP)

    def steps(self, count: int) -> float:
        """Median seconds of so many steps."""
        times = []
        for _ in range(count):
            begun = perf_counter()
            self._tokens = mx.argmax(self._batch.advance(self._tokens), axis=-1)
            mx.eval(self._tokens)
            times.append(perf_counter() - begun)
        return median(times)


def speeds(model: Any, length: int, counts: Sequence[int]) -> dict[int | None, Speed]:
    """The speed of each format."""
    prefill: dict[int | None, float] = {}
    decode: dict[int | None, dict[int, float]] = {bits: {} for bits in FORMATS}
    for count in counts:
        streams = {bits: Streams(model, bits, length, count) for bits in FORMATS}
        rounds = [{bits: own.steps(STEPS) for bits, own in streams.items()} for _ in range(ROUNDS)]
        for bits, own in streams.items():
            decode[bits][count] = count / median(each[bits] for each in rounds)
            prefill[bits] = max(prefill.get(bits, 0.0), own.prefill)
        del streams
        device.clear_cache()
    return {bits: Speed(prefill[bits], decode[bits]) for bits in FORMATS}


def agreements(loaded: loader.LoadedModel) -> dict[int | None, Agreement]:
    """The agreement of each quantised format with the cache as computed."""
    prompts = [
        tuple(loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": task.format(subject)}], add_generation_prompt=True, return_dict=False
        ))
        for subject in SUBJECTS for task in TASKS
    ]  # fmt: skip
    model, ends = loaded.model, set(loaded.tokenizer.eos_token_ids)
    set_format(model, None)
    expected = [_ended(answer, ends) for answer in answers(model, prompts)]
    found: dict[int | None, Agreement] = {}
    for bits in filter(None, FORMATS):
        set_format(model, bits)
        pairs = list(zip(expected, answers(model, prompts), strict=True))
        shares = [_common(own, other) / len(own) for own, other in pairs]
        same = [_same_next(model, prompt, own) for prompt, own in zip(prompts, expected, strict=True)]
        whole = mean(share == 1 for share in shares)
        found[bits] = Agreement(len(prompts), sum(same) / sum(map(len, expected)), mean(shares), whole)
    return found


def answers(model: Any, prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Greedy tokens behind each prompt, eight at once."""
    scheduler = Scheduler(model, max_running=8)
    greedy = SamplingParams(temperature=0.0)
    for number, prompt in enumerate(prompts):
        scheduler.insert([sequence.Sequence(number, prompt, greedy, ANSWER)])
    tokens: list[list[int]] = [[] for _ in prompts]
    while not scheduler.is_empty():
        for token in scheduler.decode():
            tokens[token.sequence_id].append(token.token)
        done = [number for number, own in enumerate(tokens) if len(own) == ANSWER]
        scheduler.remove(done)
        scheduler.prefill()
    scheduler.close()
    return tokens


def _same_next(model: Any, prompt: tuple[int, ...], answer: Sequence[int]) -> int:
    """Number of tokens of an answer that the model gives, each behind the prompt and those before it."""
    logits = model(mx.array([[*prompt, *answer[:-1]]]), cache=caches.new_cache(model))
    given: Any = mx.argmax(logits[0, len(prompt) - 1 :], axis=-1).tolist()
    return sum(own == other for own, other in zip(given, answer, strict=True))


def _ended(answer: list[int], ends: set[int]) -> list[int]:
    """The answer up to its end, which is included."""
    return next((answer[: n + 1] for n, token in enumerate(answer) if token in ends), answer)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def measure(shape: str, dtype: str, only: str, length: int, counts: Sequence[int]) -> dict[str, Any]:
    """All figures, by bits."""
    figures: dict[str, Any] = {"model": shape, "length": length, "group_size": GROUP_SIZE}
    if shape == EMBEDDED:
        loaded = loader.load(ModelSpec(shape, f"embedded:{shape}"))
        model = loaded.model
        if only != "speed":
            figures["agreement"] = {bits: asdict(own) for bits, own in agreements(loaded).items()}
    else:
        model = loader.prepare(make_model(shape, dtype), silent, current())
    figures["bytes_per_token"] = {}
    for bits in FORMATS:
        set_format(model, bits)
        figures["bytes_per_token"][bits] = bytes_per_token(model, length)
    if only != "agreement":
        figures["speed"] = {bits: asdict(own) for bits, own in speeds(model, length, counts).items()}
    return figures


def render(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{figures['model']}, {figures['length']} tokens, groups of {figures['group_size']}"]
    for bits in FORMATS:
        share = figures["bytes_per_token"][bits] / figures["bytes_per_token"][None]
        parts = [f"{figures['bytes_per_token'][bits]:.0f} bytes per token ({share:.3f})"]
        if speed := figures.get("speed", {}).get(bits):
            parts.append(f"prefill {speed['prefill']:.0f} tokens/s")
            parts += [f"{count} streams {rate:.1f} tokens/s" for count, rate in speed["decode"].items()]
        if own := figures.get("agreement", {}).get(bits):
            parts.append(f"next token {own['next_token']:.4f}, prefix {own['prefix']:.3f}, whole {own['whole']:.2f}")
        lines.append(f"{bits or 'as computed'}: " + "; ".join(parts))
    return "\n".join(lines)


def main() -> int:
    """Measure and print. --out writes the figures with the facts of the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[EMBEDDED, *SHAPES], default=EMBEDDED)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--only", choices=("agreement", "speed", "all"), default="all")
    parser.add_argument("--length", type=int, default=1024, help="tokens in the cache of each stream")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.model, arguments.dtype, arguments.only, arguments.length, arguments.streams)
    print(render(figures))
    if arguments.out:
        content = {"machine": read_machine(), **figures}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
