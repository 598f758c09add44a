"""Normalizer of JSON Schemas: what llguidance enforces is kept, what binds nothing is left out, the rest is refused.

Rule 1: what the normal form admits, the schema admits. It may admit less: keys come in a fixed order, numbers within
        64 bits.
Rule 2: a keyword that llguidance does not know is left out where it is an annotation, or always true as it is written
        there; else it is refused with its path.
Rule 3: the normal form has no identifiers, and refers to "#/$defs/..." alone, so that several documents fit in one.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from mlxserver.engine.sampling.schema_document import SchemaDocument, Subschema, Unenforceable
from mlxserver.engine.sampling.schema_exclusion import Exclusion
from mlxserver.engine.sampling.schema_keywords import (
    APPLICATORS,
    ASSERTIONS,
    BOUNDS,
    FORMATS,
    NAMED,
    REFERENCES,
    REWRITTEN,
    SINGLE,
    UNENFORCED,
    binds,
)

NESTED = frozenset(
    ["items", "additionalProperties", "allOf", "anyOf", "prefixItems", "properties", "patternProperties"]
)

LARGEST = 2**63 - 1024  # of the bounds that llguidance takes: a double within 64 bits
MAX_SCHEMAS = 20_000  # of a normal form, in which what is referred to and written in place stands twice
MAX_REFERENCES = 100  # one behind the other
MAX_EXCLUSIVE = 64  # options of oneOf that are compared in pairs


class Normalizer:
    """Normal form of one or more documents, with common definitions."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._pending: deque[tuple[str, SchemaDocument, Subschema]] = deque()
        self._num_schemas = 0

    def add(self, document: SchemaDocument, at: Subschema | None = None) -> dict[str, Any]:
        """The normal form of a document, or of a schema within it; its definitions are kept. Raises Unenforceable."""
        normal = _Form(self, document).schema(at or document.root)
        while self._pending:
            name, of, target = self._pending.popleft()
            self.definitions[name] = _Form(self, of).schema(target)
        if normal is False:
            raise Unenforceable((at or document.root).path, "no value fits it")
        return {} if normal is True else normal

    def refer(self, document: SchemaDocument, target: Subschema) -> str:
        """The reference to a definition, which is made where it is new."""
        name = self._names.get(id(target.value))
        if name is None:
            name = self._names[id(target.value)] = f"s{len(self._names)}"
            self._pending.append((name, document, target))
        return f"#/$defs/{name}"

    def count(self, at: Subschema) -> None:
        """Count a schema. Raises Unenforceable for one too many."""
        self._num_schemas += 1
        if self._num_schemas > MAX_SCHEMAS:
            raise Unenforceable(at.path, f"there are more than {MAX_SCHEMAS} schemas, references included")


class _Form:
    """Normal form of the schemas of one document."""

    def __init__(self, normalizer: Normalizer, document: SchemaDocument) -> None:
        self._normalizer = normalizer
        self._document = document
        self._exclusion = Exclusion(document)

    def schema(self, at: Subschema) -> dict[str, Any] | bool:
        """The normal form of a schema. Raises Unenforceable."""
        self._normalizer.count(at)
        if isinstance(at.value, bool):
            return at.value
        form: dict[str, Any] = {}
        keywords = at.keywords
        for keyword, value in keywords.items():
            if not binds(keyword, keywords):
                continue
            if keyword in ASSERTIONS:
                form[keyword] = _integer(value)
            elif keyword in BOUNDS:
                self._bound(at, keyword, form)
            elif keyword in NESTED:
                self._nested(at.child(keyword, value), keyword, form)
            elif keyword in REFERENCES:
                self._reference(at, keyword, form)
            elif keyword in SPECIAL:
                SPECIAL[keyword](self, at, keyword, form)
        if "propertyNames" in keywords and binds("propertyNames", keywords):
            self._name_properties(at, form)
        return form

    def _nested(self, at: Subschema, keyword: str, form: dict[str, Any]) -> None:
        """Keep schemas within a schema. A list of items is what 2020-12 calls prefixItems."""
        if isinstance(at.value, list):
            forms = [self.schema(at.child(index, item)) for index, item in enumerate(at.value)]
            form.setdefault("prefixItems" if keyword == "items" else keyword, []).extend(forms)
        elif keyword in NAMED and isinstance(at.value, Mapping):
            form[keyword] = {name: self.schema(at.child(name, item)) for name, item in at.value.items()}
        elif keyword in SINGLE:
            form[keyword] = self.schema(at)
        else:
            raise Unenforceable(at.path, f"expected {'an object' if keyword in NAMED else 'a list'}")

    def _bound(self, at: Subschema, keyword: str, form: dict[str, Any]) -> None:
        """Keep a bound, within what llguidance takes. In draft 4 an exclusive one is a flag beside another."""
        value, exclusive = at.keywords[keyword], f"exclusive{keyword[0].upper()}{keyword[1:]}"
        if isinstance(value, bool):
            return
        if not isinstance(value, int | float) or math.isnan(value):
            raise Unenforceable(f"{at.path}.{keyword}", "expected a number")
        is_lower = keyword.endswith("inimum")
        bound = max(value, -LARGEST) if is_lower else min(value, LARGEST)
        if abs(bound) > LARGEST:
            raise Unenforceable(f"{at.path}.{keyword}", "the numbers that fit it have more than 64 bits")
        form[exclusive if at.keywords.get(exclusive) is True else keyword] = bound

    def _reference(self, at: Subschema, keyword: str, form: dict[str, Any]) -> None:
        target = self._document.resolve(at, keyword)
        self._check_cycle(at, target)
        if isinstance(target.value, bool):
            reference: Any = target.value
        elif isinstance(target.value, Mapping):
            reference = {"$ref": self._normalizer.refer(self._document, target)}
        else:
            raise Unenforceable(f"{at.path}.{keyword}", "it points at no schema")
        form.setdefault("allOf", []).append(reference)

    def _check_cycle(self, at: Subschema, target: Subschema) -> None:
        """Refuse a schema that is nothing but a reference to itself."""
        end = self._dereferenced(target)
        if isinstance(end.value, Mapping) and (keyword := _only_reference(end)):
            raise Unenforceable(f"{at.path}.{keyword}", "it refers to itself alone, or too many references follow it")

    def _format(self, at: Subschema, keyword: str, form: dict[str, Any]) -> None:
        """Keep a format that is known; any other is an annotation by the standard."""
        if (name := at.keywords[keyword]) in FORMATS:
            form[keyword] = name

    def _one_of(self, at: Subschema, keyword: str, form: dict[str, Any]) -> None:
        """Keep oneOf as anyOf where its options exclude each other."""
        listed = at.child(keyword, at.keywords[keyword])
        self._nested(listed, keyword, form)
        options = [listed.child(index, item) for index, item in enumerate(listed.value)]
        if len(options) <= MAX_EXCLUSIVE and all(
            self._exclusion.excludes(one, other) for one, other in itertools.combinations(options, 2)
        ):
            form.setdefault("allOf", []).append({"anyOf": form.pop(keyword)})

    def _additional_items(self, at: Subschema, keyword: str, form: dict[str, Any]) -> None:
        """Keep what the older drafts say of the items behind a list of them; beside anything else it binds nothing."""
        if isinstance(at.keywords.get("items"), list):
            form["items"] = self.schema(at.child(keyword, at.keywords[keyword]))

    def _unevaluated(self, at: Subschema, keyword: str, form: dict[str, Any]) -> None:
        """Keep what is said of all other properties or items; it is the same where no other schema is applied."""
        adjacent = "additionalProperties" if keyword == "unevaluatedProperties" else "items"
        others = self.schema(at.child(keyword, at.keywords[keyword]))
        if others in (True, {}) or (adjacent in at.keywords and not isinstance(at.keywords[adjacent], list)):
            return
        if APPLICATORS & at.keywords.keys() or "additionalItems" in at.keywords or "contains" in at.keywords:
            raise Unenforceable(f"{at.path}.{keyword}", "it can't be enforced beside other schemas")
        form[adjacent] = others

    def _name_properties(self, at: Subschema, form: dict[str, Any]) -> None:
        """Enforce propertyNames by listing them, or by a pattern."""
        path = f"{at.path}.propertyNames"
        names = self._dereferenced(at.child("propertyNames", at.keywords["propertyNames"]))
        normal = self.schema(names)
        if normal is True or (isinstance(normal, dict) and normal.keys() <= {"type"} and "string" in names.types):
            return
        others = form.pop("additionalProperties", True)
        form["additionalProperties"] = False
        if normal is False:
            form |= {"properties": {}, "patternProperties": {}}
        elif (values := names.values) is not None and normal.keys() <= {"type", "enum", "const"}:
            if "patternProperties" in form:
                raise Unenforceable(path, "it can't be enforced beside patternProperties")
            given = form.get("properties", {})
            form["properties"] = {name: given.get(name, others) for name in values if isinstance(name, str)}
        elif (pattern := _name_pattern(normal)) and not form.keys() & {"properties", "patternProperties"}:
            form["patternProperties"] = {pattern: others}
        else:
            raise Unenforceable(path, "names are enforced by enum alone, or by one pattern for all properties")

    def _refuse(self, at: Subschema, keyword: str, form: dict[str, Any]) -> None:
        raise Unenforceable(f"{at.path}.{keyword}", f"{keyword!r} can't be enforced")

    def _dereferenced(self, at: Subschema) -> Subschema:
        """The schema, or the one that it is a mere reference to."""
        for _ in range(MAX_REFERENCES):
            if not isinstance(at.value, Mapping) or not (keyword := _only_reference(at)):
                break
            at = self._document.resolve(at, keyword)
        return at


SPECIAL = {
    "format": _Form._format,
    "oneOf": _Form._one_of,
    "additionalItems": _Form._additional_items,
    "unevaluatedProperties": _Form._unevaluated,
    "unevaluatedItems": _Form._unevaluated,
} | dict.fromkeys(UNENFORCED, _Form._refuse)


def _only_reference(at: Subschema) -> str | None:
    """The reference that is all of a schema, less annotations."""
    found = [keyword for keyword in at.keywords if keyword in REFERENCES]
    others = ASSERTIONS | BOUNDS | NESTED | UNENFORCED | REWRITTEN
    return found[0] if len(found) == 1 and not others & at.keywords.keys() else None


def _integer(value: Any) -> Any:
    """JSON's 2.0 as 2, which it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST else value


def _name_pattern(normal: Mapping[str, Any] | bool) -> str | None:
    """A pattern for strings of a normal form, if one can say it all."""
    if isinstance(normal, bool) or not normal.keys() <= {"type", "pattern", "minLength", "maxLength"}:
        return None
    if "pattern" in normal:
        return str(normal["pattern"]) if normal.keys() <= {"type", "pattern"} else None
    return f"^(?s:.){{{normal.get('minLength', 0)},{normal.get('maxLength', '')}}}$"
