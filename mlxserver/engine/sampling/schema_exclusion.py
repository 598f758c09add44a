"""Exclusion of two JSON Schemas: whether no value fits both, as far as their types, values and properties show.

A union of objects that differ by the value of one property, as many generators of schemas write it with oneOf,
is found exclusive here, references included. What is not found exclusive may still be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlxserver.engine.sampling.schema_document import SchemaDocument, Subschema
from mlxserver.engine.sampling.schema_keywords import REFERENCES

COMPARED_DEPTH = 4  # of the properties that tell two schemas apart, and of references to references
MAX_COMPARISONS = 20_000  # in a document; what is left is not found exclusive


class Exclusion:
    """Exclusion of schemas of one document."""

    def __init__(self, document: SchemaDocument) -> None:
        self._document = document
        self._left = MAX_COMPARISONS

    def excludes(self, one: Subschema, other: Subschema, depth: int = COMPARED_DEPTH) -> bool:
        """Whether two schemas exclude each other. Raises Unenforceable for a reference to nothing."""
        return any(
            self._are_apart(one_part, other_part, depth)
            for one_part in self._parts(one)
            for other_part in self._parts(other)
        )

    def _are_apart(self, one: Subschema, other: Subschema, depth: int) -> bool:
        self._left -= 1
        if self._left < 0:
            return False
        if not one.types & other.types or not self._share_a_value(one, other):
            return True
        return depth > 0 and one.types & other.types <= {"object"} and self._differ_by_property(one, other, depth)

    def _differ_by_property(self, one: Subschema, other: Subschema, depth: int) -> bool:
        for name in dict.fromkeys([*_required(one), *_required(other)]):
            mine, theirs = _property(one, name), _property(other, name)
            if any(found is not None and found.value is False for found in (mine, theirs)):
                return True
            if self._left > 0 and mine and theirs and self.excludes(mine, theirs, depth - 1):
                return True
        return False

    def _share_a_value(self, one: Subschema, other: Subschema) -> bool:
        """Whether a value that both list is the same; true unless both list values."""
        ones, others = one.values, other.values
        if ones is None or others is None or len(ones) * len(others) > self._left:
            return True
        self._left -= len(ones) * len(others)
        return any(a == b and isinstance(a, bool) == isinstance(b, bool) for a in ones for b in others)

    def _parts(self, at: Subschema) -> Sequence[Subschema]:
        """Schemas that a value must fit all of: this one, and those that it refers to."""
        parts = [at] if isinstance(at.value, Mapping) else []
        while parts and len(parts) < COMPARED_DEPTH:
            keyword = next((word for word in REFERENCES if word in parts[-1].keywords), None)
            if keyword is None or not isinstance((target := self._document.resolve(parts[-1], keyword)).value, Mapping):
                break
            parts.append(target)
        return parts


def _required(at: Subschema) -> Iterable[str]:
    names: Any = at.keywords.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _property(at: Subschema, name: str) -> Subschema | None:
    """The schema of a property; None where none is stated."""
    properties = at.keywords.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        found = at.child(name, properties[name])
        return found if isinstance(found.value, Mapping | bool) else None
    is_closed = at.keywords.get("additionalProperties") is False and "patternProperties" not in at.keywords
    return Subschema(False) if is_closed else None
