"""Types of arguments: text that a model wrote for a parameter -> JSON, by the function's schema.

Rule 1: the schema decides what a value is, never its spelling alone: text where the schema wants text stays text.
Rule 2: of several types, text is the last one: `null` is null where null is admitted, 5 a number where a number is.
Rule 3: numbers are emitted digit by digit as they were written, so that none is rounded.
Rule 4: a value that does not fit its type is emitted as text: the function can say what is wrong with it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any

from mlxserver.engine.conversation import Tool
from mlxserver.engine.output.json_calls import sendable
from mlxserver.engine.output.schema_types import EVERYTHING, admitted_types, enumerated_values, find_part

NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")
NUMBER_BEGINNING = re.compile(r"-?[\d.]*(?:[eE][+-]?\d*)?\s*")
WORDS = {"null": "null", "none": "null", "true": "true", "false": "false"}

CONTAINERS = frozenset({"string", "object", "array"})


@dataclass(frozen=True, slots=True)
class ValueType:
    """Type of one value. types: JSON types that its schema admits; words: the texts among its enumerated values."""

    types: frozenset[str]
    words: frozenset[str] = frozenset()
    schema: Any = None
    root: Any = None

    @property
    def is_text(self) -> bool:
        """Whether every value is text."""
        return self.types == {"string"}

    def may_be_other(self, beginning: str) -> bool:
        """Whether a value that begins so may turn out to be no text."""
        if self.words or "string" not in self.types:
            return True
        text = beginning.lstrip()
        if not text or (text[0] in "{[" and self.types & {"object", "array"}):
            return not self.is_text
        is_number = "integer" in self.types and NUMBER_BEGINNING.fullmatch(text)
        words: tuple[str, ...] = ("null", "none") if "null" in self.types else ()
        words += ("true", "false") if "boolean" in self.types else ()
        return bool(is_number) or any(word.startswith(text.rstrip().lower()) for word in words)

    def json(self, written: str) -> str:
        """The value as JSON text."""
        text = written.strip()
        if written in self.words:
            return quote(written)
        word = WORDS.get(text.lower())
        if word and ("null" if word == "null" else "boolean") in self.types:
            return word
        return self._number(text) or self._container(text) or quote(written)

    def _number(self, text: str) -> str | None:
        if "integer" not in self.types or not NUMBER.fullmatch(text):
            return None
        whole = WHOLE_NUMBER.fullmatch(text)
        if "number" in self.types:
            return text
        return whole[1] if whole else None

    def _container(self, text: str) -> str | None:
        wanted: tuple[type, ...] = (dict,) if "object" in self.types else ()
        wanted += (list,) if "array" in self.types else ()
        if not wanted or text[:1] not in ("{", "["):
            return None
        for read in (_read_json, _read_python):
            try:
                value, written = read(text)
                if isinstance(value, wanted):
                    return written
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
        return None

    def member(self, name: str) -> ValueType:
        """Type of a property of this object."""
        return type_of(find_part(self.schema, self.root, "properties", name), self.root)

    @property
    def items(self) -> ValueType:
        """Type of the items of this array."""
        return type_of(find_part(self.schema, self.root, "items"), self.root)


class Signatures:
    """Parameters of the functions that may be called. untyped: types of a value that no schema describes."""

    def __init__(self, tools: Iterable[Tool], untyped: frozenset[str] = CONTAINERS) -> None:
        self.tools = tuple(tools)
        self._schemas = {tool.name: tool.parameters for tool in self.tools}
        self._untyped = untyped

    def function(self, name: str) -> ValueType:
        """Type of a function's arguments."""
        schema = self._schemas.get(name)
        return ValueType(frozenset({"object"}), schema=schema, root=schema)

    def parameter(self, function: str, name: str) -> ValueType:
        """Type of a parameter of a function, known or not."""
        found = self.function(function).member(name)
        return ValueType(self._untyped) if found.types == EVERYTHING else found


def type_of(schema: Any, root: Any) -> ValueType:
    """Type of the values that a schema admits."""
    admitted = admitted_types(schema, root, 0)
    words = {value for value in enumerated_values(schema, root, 0) if isinstance(value, str)}
    return ValueType(EVERYTHING if admitted is None else admitted, frozenset(words), schema, root)


def quote(text: str) -> str:
    """The text as a JSON string."""
    return encode_basestring(text)


class ValueWriter:
    """Writer of one value, as JSON text. Text that can be nothing else is written as it comes."""

    def __init__(self, write: Callable[[str], None], kind: ValueType) -> None:
        self._write = write
        self._kind = kind
        self._held = ""
        self._is_open = kind.is_text and not kind.words
        if self._is_open:
            write('"')

    def feed(self, text: str) -> None:
        """Take a piece of the value."""
        if self._is_open:
            self._write(quote(text)[1:-1])
            return
        self._held += text
        if not self._kind.may_be_other(self._held):
            self._write(quote(self._held)[:-1])
            self._is_open = True

    def finish(self) -> None:
        """Write the rest."""
        self._write('"' if self._is_open else self._kind.json(self._held))


def _read_json(text: str) -> tuple[Any, str]:
    """A value, and its JSON text: the model's own."""
    value = json.loads(text, parse_constant=_refuse)
    return value, text


def _read_python(text: str) -> tuple[Any, str]:
    """A value in Python's spelling, as templates write lists and objects, or in JSON with raw line breaks."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        value = ast.literal_eval(_JsonWords().visit(ast.parse(text, mode="eval")))
    return value, sendable(json.dumps(value, ensure_ascii=False, allow_nan=False))


class _JsonWords(ast.NodeTransformer):
    """Replaces JSON's words, which templates put into Python's spelling."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """A constant for a word that JSON knows."""
        words = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(words[node.id]), node) if node.id in words else node


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")
