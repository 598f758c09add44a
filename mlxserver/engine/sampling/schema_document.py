"""JSON Schema as a document: its subschemas with their places, and what its references point at.

After JSON Schema 2020-12, core, sections 8 and 9. Of the older drafts: `definitions`, `id`, a "#name" as `$id`, and
`$recursiveRef`. A reference to another document is not followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urljoin

from mlxserver.engine.sampling.schema_keywords import ANCHORS, LISTED, NAMED, SINGLE, stated_types

INDEX = re.compile("[0-9]{1,9}")
LONGEST_KEY = 64  # characters of a property's name in a path


class Unenforceable(ValueError):
    """A schema can't be enforced. path: of the keyword, from the root of its document: ".properties.to.pattern"."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Subschema:
    """A schema within a document. base: the URI that its references are relative to. path: from the root."""

    value: Any
    base: str = ""
    path: str = ""

    @property
    def keywords(self) -> Mapping[str, Any]:
        """The keywords that have a value: null is no value, except of `const`. Raises Unenforceable."""
        if isinstance(self.value, bool):
            return {} if self.value else {"not": {}}
        if not isinstance(self.value, Mapping):
            raise Unenforceable(self.path, "a schema is an object, true or false")
        return {name: value for name, value in self.value.items() if value is not None or name == "const"}

    @property
    def types(self) -> frozenset[str]:
        """The types that are stated, or all; an integer is a number."""
        return stated_types(self.keywords)

    @property
    def values(self) -> list[Any] | None:
        """The values that are listed; None where none are."""
        if "const" in self.keywords:
            return [self.keywords["const"]]
        listed = self.keywords.get("enum")
        return listed if isinstance(listed, list) else None

    def child(self, key: str | int, value: Any) -> Subschema:
        """The value at a key; a schema there may change the base."""
        path = f"{self.path}[{key}]" if isinstance(key, int) else f"{self.path}.{key[:LONGEST_KEY]}"
        return Subschema(value, _base(self.base, value), path)

    def children(self) -> Iterator[Subschema]:
        """The schemas directly within this one."""
        if not isinstance(self.value, Mapping):
            return
        for keyword, value in self.value.items():
            at = self.child(keyword, value)
            if keyword in LISTED and isinstance(value, list):
                yield from (at.child(index, item) for index, item in enumerate(value))
            elif keyword in NAMED and isinstance(value, Mapping):
                yield from (at.child(name, item) for name, item in value.items() if isinstance(item, Mapping | bool))
            elif keyword in SINGLE and isinstance(value, Mapping | bool):
                yield at


class SchemaDocument:
    """A schema with its identifiers. name: what it describes, as an error names it. param: of the request."""

    def __init__(self, root: Mapping[str, Any], name: str, param: str) -> None:
        self.name = name
        self.param = param
        self.root = Subschema(root, _base("", root))
        self._resources = {"": self.root, self.root.base: self.root}
        self._anchors: dict[str, Subschema] = {}
        self._dynamic: dict[str, int] = {}  # how many schemas have a dynamic anchor of this name
        pending = [self.root]
        while pending:
            at = pending.pop()
            self._index(at)
            pending += at.children()

    def resolve(self, at: Subschema, keyword: str) -> Subschema:
        """The schema that a reference of a subschema points at. Raises Unenforceable."""
        reference, path = at.keywords[keyword], f"{at.path}.{keyword}"
        if not isinstance(reference, str):
            raise Unenforceable(path, "a reference is a string")
        uri, _, fragment = reference.partition("#")
        base = _join(at.base, uri) if uri else at.base
        if base not in self._resources:
            raise Unenforceable(path, f"{reference[:LONGEST_KEY]!r} is in another document, which is not fetched")
        if keyword == "$dynamicRef" and self._dynamic.get(fragment, 0) > 1:
            raise Unenforceable(path, f"{reference[:LONGEST_KEY]!r} has several targets, which depend on its use")
        resource = self._resources[base]
        if not fragment.startswith("/"):
            target = self._anchors.get(f"{base}#{unquote(fragment)}") if fragment else resource
        else:
            target = _follow(resource, unquote(fragment))
        if target is None:
            raise Unenforceable(path, f"{reference[:LONGEST_KEY]!r} points at nothing")
        return target

    def _index(self, at: Subschema) -> None:
        if not isinstance(at.value, Mapping):
            return
        for keyword in ("$id", "id"):
            identifier = at.value.get(keyword)
            if isinstance(identifier, str) and (uri := identifier.partition("#")[0]):
                self._resources.setdefault(at.base if keyword == "$id" else _join(at.base, uri), at)
            elif isinstance(identifier, str):
                self._anchors.setdefault(f"{at.base}{identifier}", at)
        for keyword in ANCHORS:
            if isinstance(name := at.value.get(keyword), str):
                self._anchors.setdefault(f"{at.base}#{name}", at)
                self._dynamic[name] = self._dynamic.get(name, 0) + (keyword == "$dynamicAnchor")


def _base(base: str, value: Any) -> str:
    identifier = value.get("$id") if isinstance(value, Mapping) else None
    return _join(base, identifier.partition("#")[0]) if isinstance(identifier, str) else base


def _join(base: str, uri: str) -> str:
    try:
        return urljoin(base, uri)
    except ValueError:  # no URI
        return uri


def _follow(at: Subschema, pointer: str) -> Subschema | None:
    """The value at a JSON pointer (RFC 6901)."""
    for escaped in pointer[1:].split("/"):
        key = escaped.replace("~1", "/").replace("~0", "~")
        if isinstance(at.value, Mapping) and key in at.value:
            at = at.child(key, at.value[key])
        elif isinstance(at.value, list) and INDEX.fullmatch(key) and int(key) < len(at.value):
            at = at.child(int(key), at.value[int(key)])
        else:
            return None
    return at
