"""Validation of structured values against the JSON Schema that describes them.

Rule 1: supported is what requests need of JSON Schema: type, const, enum, pattern, maxItems, items, properties,
        required and additionalProperties: false.
Rule 2: the error names the path of the first fault, as in "tools[1].function.name".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxserver.api.schema.parameters import EXPECTATIONS, TYPE_NAMES, ValidationFailed, abbreviate, invalid

TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}
WORDS = {TYPE_NAMES[type_]: words for type_, words in EXPECTATIONS.items()} | {"array": "a list"}


def check_shape(value: Any, shape: Mapping[str, Any], param: str) -> None:
    """Check a value against its JSON Schema. Raises ValidationFailed."""
    if not _fits(value, shape):
        raise invalid(param, value, shape.get("description") or _expected(shape))
    if isinstance(value, dict):
        _check_fields(value, shape, param)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_shape(item, shape.get("items", {}), f"{param}[{index}]")


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: field for name, field in value.items() if field is not None}


def _fits(value: Any, shape: Mapping[str, Any]) -> bool:
    names = shape.get("type", list(TYPES))
    types = {type_ for name in ([names] if isinstance(names, str) else names) for type_ in TYPES[name]}
    choices = shape.get("enum") or ([shape["const"]] if "const" in shape else None)
    return (
        type(value) in types
        and (choices is None or value in choices)
        and (not isinstance(value, str) or re.fullmatch(shape.get("pattern", "(?s:.*)"), value) is not None)
        and (not isinstance(value, list) or len(value) <= shape.get("maxItems", len(value)))
    )


def _check_fields(value: dict[str, Any], shape: Mapping[str, Any], param: str) -> None:
    fields = shape.get("properties", {})
    for name, field in fields.items():
        if name in value or name in shape.get("required", ()):
            check_shape(value.get(name), field, f"{param}.{name}")
    for name in value:
        if name not in fields and shape.get("additionalProperties", True) is False:
            raise ValidationFailed(f"Unknown field {abbreviate(name)} in '{param}'.", f"{param}.{name[:64]}")


def _expected(shape: Mapping[str, Any]) -> str:
    """What a JSON Schema takes, as a noun phrase."""
    if "const" in shape:
        return repr(shape["const"])
    if "enum" in shape:
        return "one of " + ", ".join(map(repr, shape["enum"]))
    names = shape.get("type", "object")
    return " or ".join(WORDS[name] for name in ([names] if isinstance(names, str) else names) if name in WORDS)
