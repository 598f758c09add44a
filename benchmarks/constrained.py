"""Cost and validity of constrained decoding by JSON Schema: sampled answers of a real model, in-process, in one batch.

python -m benchmarks.constrained --model embedded:smollm2

Rule 1: the same prompts, seeds and temperature 1 with the schemas and without them, each free answer as long as the
        constrained one: the batch is as full in both.
Rule 2: both take turns, a round of each, so that other load on the machine affects both.
Rule 3: every value is bounded, as in a schema of a user who wants whole answers. The digits behind a decimal point have
        no limit, so there are integers, and strings with a pattern, but no numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.conversation import Message, Text
from mlxserver.engine.events import Delta, Finish
from mlxserver.engine.requests import ChatPrompt, GenerationRequest, JsonFormat
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.worker.runner import Output, Runner

ROUNDS, SEEDS = 5, 2  # every schema once per seed, in every round
MAX_TOKENS = 1000
WORD: dict[str, Any] = {"type": "string", "maxLength": 16}


def of(**properties: Any) -> dict[str, Any]:
    """Schema of an object with all of these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def integer(least: int, most: int) -> dict[str, Any]:
    """Schema of an integer."""
    return {"type": "integer", "minimum": least, "maximum": most}


def text_like(pattern: str) -> dict[str, Any]:
    """Schema of a string that matches a pattern."""
    return {"type": "string", "pattern": pattern}


SCHEMAS: dict[str, dict[str, Any]] = {
    "a city": of(city=WORD, people=integer(0, 10**8)),
    "a yes or no": of(answer={"enum": ["yes", "no"]}),
    "a colour": of(name=WORD, rgb={"type": "array", "items": integer(0, 255), "minItems": 3, "maxItems": 3}),
    "a person": of(name=WORD, age=integer(0, 120), is_alive={"type": "boolean"}),
    "a list of fruits": {"type": "array", "items": WORD, "minItems": 1, "maxItems": 3},
    "a date": of(year=integer(1, 9999), month=integer(1, 12)),
    "a nested address": of(street=WORD, place=of(town=WORD, code=text_like("^[0-9]{5}$"))),
    "a price or nothing": of(price={"anyOf": [text_like("^[0-9]{1,4}[.][0-9]{2}$"), {"type": "null"}]}),
    "a grade": of(subject=WORD, grade={"enum": ["A", "B", "C", "D"]}),
    "a point": of(x=integer(-1000, 1000), y=integer(-1000, 1000)),
}


def request(
    subject: str, seed: int, schema: dict[str, Any] | None = None, length: int | None = None
) -> GenerationRequest:
    """A request at temperature 1, answered by a schema, or by `length` tokens."""
    return GenerationRequest(
        ChatPrompt((Message("user", (Text(f"Describe {subject} as JSON."),)),)),
        {"temperature": 1.0, "seed": seed},
        max_tokens=length or MAX_TOKENS,
        ignore_eos=length is not None,
        format=JsonFormat(schema) if schema else None,
    )


@dataclass(frozen=True)
class Answers:
    """Answers to a batch of requests: the events and the number of tokens of each, and the seconds of all."""

    events: list[list[Any]]
    lengths: list[int]
    seconds: float


def generate(runner: Runner, requests: Sequence[GenerationRequest]) -> Answers:
    """Answer all requests in one batch."""
    ids = itertools.count()
    outputs: dict[int, tuple[Output, list[Any]]] = {}
    started = time.perf_counter()
    for one in requests:
        choices = runner.prepare(one, ids)
        runner.batch.insert([row for row, _ in choices])
        outputs |= {row.id: (output, []) for row, output in choices}
    while not runner.batch.is_empty():
        finished = []
        for token in runner.batch.decode():
            output, events = outputs[token.sequence_id]
            events += output.feed(token)
            if events and isinstance(events[-1], Finish):
                finished.append(token.sequence_id)
        runner.batch.remove(finished)
        runner.batch.prefill()
    seconds = time.perf_counter() - started
    read = outputs.values()
    return Answers([events for _, events in read], [output.completion_tokens for output, _ in read], seconds)


def is_valid(events: list[Any], schema: dict[str, Any]) -> bool:
    """Whether the whole answer is JSON of the schema."""
    text = "".join(event.text for event in events if isinstance(event, Delta))
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def compile_all(runner: Runner) -> float:
    """Compile all schemas; the seconds it takes."""
    started = time.perf_counter()
    for subject, schema in SCHEMAS.items():
        runner.preprocess(request(subject, 0, schema))
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded:smollm2")
    parser.add_argument("--rows", type=int, default=16, help="sequences of the batch")
    options = parser.parse_args()
    spec = ModelSpec("bench", options.model, type="instruction", max_running=options.rows)
    runner = Builder(0.25).build(spec)
    compiling = compile_all(runner)
    generate(runner, [request(subject, 0, length=2) for subject in SCHEMAS])  # the prefix cache has the prompts now
    valid = tokens = 0
    seconds = {"constrained": 0.0, "free": 0.0}
    for first in range(0, ROUNDS * SEEDS, SEEDS):
        asked = [(subject, seed) for seed in range(first, first + SEEDS) for subject in SCHEMAS]
        constrained = generate(runner, [request(*one, SCHEMAS[one[0]]) for one in asked])
        free = generate(runner, [request(*one, length=n) for one, n in zip(asked, constrained.lengths, strict=True)])
        valid += sum(
            is_valid(events, SCHEMAS[subject]) for events, (subject, _) in zip(constrained.events, asked, strict=True)
        )
        tokens += sum(constrained.lengths)
        seconds["constrained"] += constrained.seconds
        seconds["free"] += free.seconds
    runner.batch.close()
    rates = tokens / seconds["constrained"], tokens / seconds["free"]
    print(f"valid: {valid} of {ROUNDS * SEEDS * len(SCHEMAS)} answers over {len(SCHEMAS)} schemas at temperature 1")
    print(f"with schemas {rates[0]:.1f} tokens/s, free {rates[1]:.1f} tokens/s, ratio {rates[0] / rates[1]:.2f}")
    print(f"first use of all schemas: {compiling * 1000:.0f} ms")


if __name__ == "__main__":
    main()
