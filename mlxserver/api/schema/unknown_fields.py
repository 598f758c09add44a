"""Unknown fields inside of a parameter: what an object has beyond its JSON Schema, where that is closed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

# Accepted without effect in every object of a request: hints to a cache or a renderer, and a tool's strictness at a
# place where it means nothing.
HARMLESS_FIELDS = frozenset({"cache_control", "defer_loading", "eager_input_streaming", "strict"})


def drop_fields(values: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]], *, drops_all: bool) -> list[str]:
    """Drop, in place, the unknown fields of parameters: all, or only the harmless ones.

    Returns the paths of the dropped fields that are not harmless, as in "tools[0].function.returns".
    """
    names = None if drops_all else HARMLESS_FIELDS
    dropped = (place for name, value in values.items() for place in _drop(value, shapes[name], name, names))
    return [path for path, field in dropped if field not in HARMLESS_FIELDS]


def _drop(value: Any, shape: Mapping[str, Any], path: str, names: Collection[str] | None) -> Iterator[tuple[str, str]]:
    """Drop the fields of these names, None: of any; yields the path and the name of each."""
    if isinstance(value, list) and "items" in shape:
        for index, item in enumerate(value):
            yield from _drop(item, shape["items"], f"{path}[{index}]", names)
    elif isinstance(value, dict):
        shape = _variant(value, shape)
        fields, is_closed = shape.get("properties", {}), shape.get("additionalProperties", True) is False
        for name in list(value):
            if name in fields:
                yield from _drop(value[name], fields[name], f"{path}.{name}", names)
            elif is_closed and (names is None or name in names):
                del value[name]
                yield f"{path}.{name[:64]}", name


def _variant(value: Mapping[str, Any], shape: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of several shapes the one that the value means to have, by its required fields and those of few values."""
    return next((one for one in shape.get("anyOf", ()) if _is_meant(value, one)), shape)


def _is_meant(value: Mapping[str, Any], shape: Mapping[str, Any]) -> bool:
    if any(name not in value for name in shape.get("required", ())):
        return False
    choices = {
        name: field["enum"] if "enum" in field else [field["const"]]
        for name, field in shape.get("properties", {}).items()
        if "enum" in field or "const" in field
    }
    return "properties" in shape and all(value[name] in choices[name] for name in choices if name in value)
