"""What a JSON schema costs, and that it holds: sampled answers of a real model, in-process, in one batch.

python -m benchmarks.constrained --model embedded:smollm2

Rule: the same prompts, seeds and temperature 1 with the schemas and without them; answers of the free run are as long.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import jsonschema

from engine.config import ModelSpec
from engine.jobs import Output
from engine.runtime import Builder, ModelRuntime
from engine.types import ChatPrompt, Delta, Finish, GenerationRequest, JsonFormat, SamplingOptions

RUNS = 10  # of each schema
WORD: dict[str, Any] = {"type": "string", "maxLength": 16}


def of(**properties: Any) -> dict[str, Any]:
    """The schema of an object with all of these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "a city": of(city=WORD, people={"type": "integer", "minimum": 0, "maximum": 10**8}),
    "a yes or no": of(answer={"enum": ["yes", "no"]}),
    "a colour": of(name=WORD, rgb={"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3}),
    "a person": of(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}, is_alive={"type": "boolean"}),
    "a list of fruits": {"type": "array", "items": WORD, "minItems": 1, "maxItems": 3},
    "a date": of(year={"type": "integer"}, month={"type": "integer", "minimum": 1, "maximum": 12}),
    "a nested address": of(street=WORD, place=of(town=WORD, code={"type": "string", "pattern": "^[0-9]{5}$"})),
    "a price or nothing": of(price={"anyOf": [{"type": "number"}, {"type": "null"}]}),
    "a grade": of(subject=WORD, grade={"enum": ["A", "B", "C", "D"]}),
    "a point": of(x={"type": "number"}, y={"type": "number"}),
}


def request(subject: str, schema: dict[str, Any] | None, seed: int) -> GenerationRequest:
    """One question at temperature 1."""
    messages = [{"role": "user", "content": f"Describe {subject} as JSON."}]
    return GenerationRequest(
        ChatPrompt(messages),
        SamplingOptions(temperature=1.0, seed=seed),
        max_tokens=400,
        format=JsonFormat(schema) if schema else None,
    )


def generate(runtime: ModelRuntime, requests: Sequence[GenerationRequest]) -> tuple[list[list[Any]], int, float]:
    """The events of each request, tokens in all, and seconds."""
    ids = itertools.count()
    outputs: dict[int, tuple[Output, list[Any]]] = {}
    started = time.perf_counter()
    for one in requests:
        choices = runtime.prepare(one, ids)
        runtime.batch.insert([row for row, _ in choices])
        outputs |= {row.id: (output, []) for row, output in choices}
    while not runtime.batch.is_empty():
        finished = []
        for token in runtime.batch.decode():
            output, events = outputs[token.row_id]
            events += output.feed(token)
            if events and isinstance(events[-1], Finish):
                finished.append(token.row_id)
        runtime.batch.remove(finished)
        runtime.batch.prefill()
    seconds = time.perf_counter() - started
    return [events for _, events in outputs.values()], sum(o.completion_tokens for o, _ in outputs.values()), seconds


def is_valid(events: list[Any], schema: dict[str, Any]) -> bool:
    """Whether the whole answer is JSON of the schema."""
    text = "".join(event.text for event in events if isinstance(event, Delta))
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded:smollm2")
    runtime = Builder(0.25).build(ModelSpec("bench", parser.parse_args().model, type="instruction"))
    asked = [(subject, schema, seed) for seed in range(RUNS) for subject, schema in SCHEMAS.items()]
    bound, bound_tokens, bound_seconds = generate(runtime, [request(*one) for one in asked])
    valid = sum(is_valid(events, schema) for events, (_, schema, _) in zip(bound, asked, strict=True))
    free_requests = [request(subject, None, seed) for subject, _, seed in asked]
    limit = max(1, bound_tokens // len(asked))
    short = [GenerationRequest(r.prompt, r.sampling, max_tokens=limit, ignore_eos=True) for r in free_requests]
    _, free_tokens, free_seconds = generate(runtime, short)
    runtime.batch.close()
    rates = bound_tokens / bound_seconds, free_tokens / free_seconds
    print(f"valid: {valid} of {len(asked)} answers over {len(SCHEMAS)} schemas at temperature 1")
    print(f"with schemas {rates[0]:.1f} tokens/s, free {rates[1]:.1f} tokens/s, ratio {rates[0] / rates[1]:.2f}")


if __name__ == "__main__":
    main()
