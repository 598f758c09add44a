"""Bodies for every endpoint that takes one, from the schemas that are declared: a new endpoint is covered at once.

Rule: nothing is downloaded, and no answer is long.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from mlxserver.api.endpoint import Endpoint
from mlxserver.api.endpoints import ENDPOINTS
from mlxserver.api.schema.parameters import json_schema

MODEL, TALKER = "tiny", "talker"  # of random weights; thinks, calls and talks
VECTORS, RANKER = "vectors", "ranker"
RESPONSE = f"resp_{'0' * 32}"  # as long as the id of any response
NOWHERE = "/no/such/model"  # what endpoints that manage are asked for
HELLO = [{"role": "user", "content": "hello"}]
GOOD: Mapping[str, Any] = {
    "model": MODEL,
    "messages": HELLO,
    "prompt": "hello",
    "input": "hello",
    "tokens": [5, 6, 7],
    "query": "hello",
    "documents": ["hello there", "good bye"],
    "key": "unknown",
}
LENGTHS = {MODEL: 3, TALKER: 40}  # of answers, in tokens
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
TOOLS: Mapping[str, Any] = {  # by the name of an endpoint
    "chat_completions": {"type": "function", "function": TOOL},
    "ollama_chat": {"type": "function", "function": TOOL},
    "responses": {"type": "function", **TOOL},
    "messages": {"name": "add", "input_schema": {"type": "object"}},
    "count_tokens": {"name": "add", "input_schema": {"type": "object"}},
}
SUBJECTS = ("messages", "input", "prompt")  # of which a request has one
LIMITS = ("max_tokens", "max_output_tokens", "options")  # of answers, given wherever there are such
WEIGHTS = {"chat_completions": 8, "completions": 4}  # of endpoints; those that generate have GENERATING, others 2 or 1
GENERATING = 4
DEPTH = 4  # of a value made from a schema
ENDLESS = tuple(each for each in ENDPOINTS if each.name in ("events", "benchmark"))  # streams that last
TAKING = tuple(each for each in ENDPOINTS if each.request and "{" not in each.path and each not in ENDLESS)
SCHEMAS: Mapping[str, Mapping[str, Any]] = {each.path: json_schema(each.request) for each in TAKING if each.request}
PARAMETERS = sorted({name for schema in SCHEMAS.values() for name in schema["properties"]})
STREAMING = frozenset(endpoint.path for endpoint in TAKING if endpoint.chunk and endpoint.dialect)


def weight(endpoint: Endpoint) -> int:
    """How often an endpoint is asked, beside the others."""
    return WEIGHTS.get(endpoint.name, GENERATING if endpoint.dialect else 1 if endpoint.manages else 2)


def models_of(endpoint: Endpoint) -> tuple[str, ...]:
    """The models that an endpoint is asked for, some of another kind than it needs."""
    if "rerank" in endpoint.path:
        return (RANKER, RANKER, RANKER, VECTORS)
    is_for_vectors = "embed" in endpoint.path
    return (VECTORS, VECTORS, VECTORS, MODEL) if is_for_vectors else (*[MODEL] * 6, *[TALKER] * 6, VECTORS)


def good_body(endpoint: Endpoint, model: str = MODEL) -> dict[str, Any]:
    """A body that is right, or, of an endpoint that manages, one that names nothing that exists."""
    schema = SCHEMAS[endpoint.path]
    subject = next((name for name in SUBJECTS if name in schema["properties"]), "")
    extra = [name for name in (subject, *LIMITS) if name in schema["properties"]]
    names = dict.fromkeys([*schema["required"], *extra])
    draw = random.Random(0)
    length = LENGTHS.get(model, 3)
    good = {**GOOD, "model": model, **dict.fromkeys(LIMITS[:2], length), "options": {"num_predict": length}}
    body = {name: good[name] if name in good else value(schema["properties"][name], draw) for name in names}
    if endpoint.name in TOOLS and model == TALKER:
        body["tools"] = [TOOLS[endpoint.name]]
    if endpoint.manages:
        named = {"model": NOWHERE, "key": "unknown"}
        body |= {name: wrong for name, wrong in named.items() if name in body}
    return body


def value(schema: Mapping[str, Any], draw: random.Random, depth: int = DEPTH) -> Any:
    """A value that the schema allows, at least as far as its types go."""
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return value(draw.choice(choices), draw, depth)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return draw.choice(schema["enum"])
    match schema.get("type"):
        case "object" if depth:
            fields = schema.get("properties", {})
            needed = schema.get("required", ())
            chosen = [name for name in fields if name in needed or draw.random() < 0.4]
            return {name: value(fields[name], draw, depth - 1) for name in chosen}
        case "array" if depth:
            return [value(schema.get("items", {}), draw, depth - 1) for _ in range(draw.randint(0, 3))]
        case "object":
            return {}
        case "array":
            return []
        case "boolean":
            return draw.random() < 0.5
        case "integer" | "number":
            return draw.choice((schema.get("minimum", 0), schema.get("maximum", 1), 0, 1, 2))
        case "string":
            return draw.choice(("", "x", "hello", "5m", "data:image/png;base64,AAAA"))
        case "null":
            return None
    return draw.choice((None, 1, "x", [], {}, True))
