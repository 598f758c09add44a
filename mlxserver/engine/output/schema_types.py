"""Types that a JSON Schema admits, as far as its keywords say so: what an argument may be, not whether it is valid.

References within the document are followed; a schema that names no type admits any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

DEPTH = 16  # of references: a schema may refer to itself

TYPES = {
    **dict.fromkeys(("string", "str", "text", "varchar", "char"), frozenset({"string"})),
    **dict.fromkeys(("integer", "int", "long", "short", "unsigned"), frozenset({"integer"})),
    **dict.fromkeys(("number", "float", "double"), frozenset({"number", "integer"})),
    **dict.fromkeys(("boolean", "bool"), frozenset({"boolean"})),
    **dict.fromkeys(("object", "dict", "map"), frozenset({"object"})),
    **dict.fromkeys(("array", "arr", "list", "tuple"), frozenset({"array"})),
    **dict.fromkeys(("null", "none"), frozenset({"null"})),
}
EVERYTHING = frozenset({"string", "integer", "number", "boolean", "object", "array", "null"})


def admitted_types(schema: Any, root: Any, depth: int) -> frozenset[str] | None:
    """JSON types of the values that a schema admits; None for any."""
    if not isinstance(schema, dict) or depth > DEPTH:
        return None
    found: list[frozenset[str] | None] = []
    if "$ref" in schema:
        found.append(admitted_types(resolve(schema["$ref"], root), root, depth + 1))
    if "type" in schema:
        found.append(_named(schema["type"]))
    if "const" in schema or isinstance(schema.get("enum"), list):
        found.append(frozenset().union(*(_types_of_value(value) for value in _own_values(schema))))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found.append(_union(admitted_types(part, root, depth + 1) for part in schema[key]))
    for part in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found.append(admitted_types(part, root, depth + 1))
    known = [types for types in found if types is not None]
    if not known:
        return frozenset({"object"}) if "properties" in schema else None
    together = known[0].intersection(*known[1:])
    return together | {"null"} if schema.get("nullable") is True else together


def _named(names: Any) -> frozenset[str] | None:
    """Types by their names in a schema."""
    listed = names if isinstance(names, list) else [names]
    return _union(TYPES.get(str(name).strip().lower()) for name in listed)


def _union(kinds: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    together: frozenset[str] = frozenset()
    for kind in kinds:
        if kind is None:
            return None
        together |= kind
    return together or None


def _types_of_value(value: Any) -> frozenset[str]:
    if isinstance(value, bool):
        return frozenset({"boolean"})
    kinds = {str: "string", int: "integer", float: "number", dict: "object", list: "array", type(None): "null"}
    return TYPES[kinds[type(value)]]


def _own_values(schema: Mapping[str, Any]) -> list[Any]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum") or ())


def enumerated_values(schema: Any, root: Any, depth: int) -> list[Any]:
    """The values that a schema lists."""
    if not isinstance(schema, dict) or depth > DEPTH:
        return []
    values = _own_values(schema) if "const" in schema or isinstance(schema.get("enum"), list) else []
    if "$ref" in schema:
        values += enumerated_values(resolve(schema["$ref"], root), root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema[key] if isinstance(schema.get(key), list) else ():
            values += enumerated_values(part, root, depth + 1)
    return values


def find_part(schema: Any, root: Any, *path: str, depth: int = 0) -> Any:
    """The part of an object's or array's schema at a path, in the schema itself or in one that it is made of."""
    if not isinstance(schema, dict) or depth > DEPTH:
        return None
    part: Any = schema
    for key in path:
        part = part.get(key) if isinstance(part, dict) else None
    if part is not None:
        return part
    parts = [resolve(schema["$ref"], root)] if "$ref" in schema else []
    for key in ("allOf", "anyOf", "oneOf"):
        parts += schema[key] if isinstance(schema.get(key), list) else []
    return next((found for one in parts if (found := find_part(one, root, *path, depth=depth + 1)) is not None), None)


def resolve(reference: Any, root: Any) -> Any:
    """The schema that a local reference means; None where there is none."""
    part = root
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    for key in filter(None, reference[1:].split("/")):
        key = key.replace("~1", "/").replace("~0", "~")
        part = part.get(key) if isinstance(part, dict) else None
    return part
