"""Keywords of JSON Schema: what they hold, what type of value they bind, and where they bind nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES = frozenset(["null", "boolean", "number", "string", "array", "object"])
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
ANCHORS = ("$anchor", "$dynamicAnchor")

# Where schemas are within a schema: the value itself, in a list, by name.
SINGLE = frozenset(
    [
        "additionalProperties",
        "additionalItems",
        "items",
        "not",
        "if",
        "then",
        "else",
        "contains",
        "propertyNames",
        "unevaluatedProperties",
        "unevaluatedItems",
        "contentSchema",
    ]
)
LISTED = frozenset(["allOf", "anyOf", "oneOf", "prefixItems", "items"])
NAMED = frozenset(["properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"])

# What llguidance enforces.
ASSERTIONS = frozenset(
    [
        "type",
        "enum",
        "const",
        "pattern",
        "required",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "multipleOf",
    ]
)
BOUNDS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
FORMATS = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]

# What it does not; here it can be refused, or said in other words.
UNENFORCED = frozenset(
    ["not", "if", "contains", "uniqueItems", "dependentRequired", "dependentSchemas", "dependencies"]
)
REWRITTEN = frozenset(
    ["oneOf", "format", "additionalItems", "unevaluatedProperties", "unevaluatedItems", "propertyNames"]
)
APPLICATORS = frozenset(["allOf", "anyOf", "oneOf", "if", "dependentSchemas", "dependencies"]) | {*REFERENCES}

BOUND_TYPES = {
    "additionalItems": "array",
    "contains": "array",
    "uniqueItems": "array",
    "unevaluatedItems": "array",
    "format": "string",
    "dependentRequired": "object",
    "dependentSchemas": "object",
    "dependencies": "object",
    "propertyNames": "object",
    "unevaluatedProperties": "object",
}


def stated_types(keywords: Mapping[str, Any]) -> frozenset[str]:
    """The types that a schema states, or all; an integer is a number."""
    stated = keywords.get("type")
    names = [stated] if isinstance(stated, str) else stated if isinstance(stated, list) else TYPES
    return frozenset("number" if name == "integer" else name for name in names if isinstance(name, str))


def binds(keyword: str, keywords: Mapping[str, Any]) -> bool:
    """Whether a keyword of a schema can make a value unfit, by the standard; true unless it certainly can't."""
    value = keywords[keyword]
    if (bound := BOUND_TYPES.get(keyword)) and bound not in stated_types(keywords):
        return False
    match keyword:
        case "not":
            return not _is_never(value)
        case "if":
            return not all(_is_always(keywords.get(branch, True)) for branch in ("then", "else"))
        case "required":
            return value is not False  # draft 3 has it at the property
        case "uniqueItems":
            return value is not False and keywords.get("maxItems") not in (0, 1)
        case "contains":
            return bool(keywords.get("minContains", 1)) or "maxContains" in keywords
        case "dependentRequired" | "dependencies" | "dependentSchemas":
            return not isinstance(value, Mapping) or not all(part == [] or _is_always(part) for part in value.values())
        case _:
            return True


def _is_always(schema: Any) -> bool:
    return schema is True or schema == {}


def _is_never(schema: Any) -> bool:
    return schema is False or (isinstance(schema, Mapping) and _is_always(schema.get("not")))
