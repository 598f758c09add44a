"""Readers of calls whose parameters stand between tags, as text: <parameter=name>value</parameter> and its like.

Rule 1: a value is the text between its tags, white space included; one line break beside a tag belongs to the tag where
        the format sets it.
Rule 2: calls are emitted while the model writes them, as the JSON text of their arguments (output/argument_types.py).
Rule 3: at a tag that is missing the call ends, with what was read of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mlxserver.engine.output.argument_types import CONTAINERS, Signatures, ValueType, ValueWriter, quote
from mlxserver.engine.output.call_reading import (
    HEADER_LENGTH,
    CallSink,
    EndOfText,
    Reading,
    check_name,
    expect,
    follow,
    until,
)
from mlxserver.engine.output.schema_types import EVERYTHING, TYPES

ATTRIBUTE = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""")
TEXT = ValueType(frozenset({"string"}))
NO_TEXT = ValueType(EVERYTHING - {"string"})
CDATA, CDATA_END = "<![CDATA[", "]]>"


class ArgumentsWriter:
    """Writer of the arguments of one call, an object, into a sink."""

    def __init__(self, sink: CallSink, name: str) -> None:
        sink.begin(name)
        sink.write("{")
        self._sink = sink
        self._is_first = True

    def value(self, key: str, kind: ValueType) -> ValueWriter:
        """Write a key; the writer of its value."""
        self.key(key)
        return ValueWriter(self._sink.write, kind)

    def key(self, key: str) -> None:
        """Write a key."""
        self._sink.write(("" if self._is_first else ", ") + quote(key) + ": ")
        self._is_first = False

    def close(self) -> None:
        """End the object, and the call."""
        self._sink.write("}")
        self._sink.end()


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """Reader of `<call>name> <parameter>name>value</parameter> </call>`.

    call, parameter: beginning and end of an opening tag, with a name, or attributes, between. breaks: a line break
    stands on both sides of a value. untyped: types of a value that no schema describes. has_cdata: values may stand in
    a CDATA section.
    """

    call: tuple[str, str]
    call_end: str
    parameter: tuple[str, str]
    parameter_end: str
    end: str = ""
    breaks: bool = False
    untyped: frozenset[str] = CONTAINERS
    has_cdata: bool = False

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read the calls behind a start tag."""
        if start != self.call[0] and not (yield from expect(sink, self.call[0])):
            raise ValueError("no function behind the tag")
        while True:
            header, _ = yield from until(self.call[1], limit=HEADER_LENGTH)
            yield from self._read_call(sink, signatures, _attributes(header)[0])
            if (yield from follow(sink, self.call[0], self.end)) != self.call[0]:
                return

    def _read_call(self, sink: CallSink, signatures: Signatures, name: str) -> Reading[None]:
        name = check_name(name)
        marker = yield from expect(sink, self.parameter[0], self.call_end)
        if not marker:
            raise ValueError(f"no parameters behind {name!r}")
        arguments = ArgumentsWriter(sink, name)
        try:
            while marker == self.parameter[0]:
                header, _ = yield from until(self.parameter[1])
                yield from self._read_value(sink, arguments, signatures, name, header)
                marker = yield from expect(sink, self.parameter[0], self.call_end)
        except EndOfText as end:
            if end.is_cut:
                raise
        arguments.close()

    def _read_value(
        self, sink: CallSink, arguments: ArgumentsWriter, signatures: Signatures, name: str, header: str
    ) -> Reading[None]:
        key, kind = _attributes(header)
        value = arguments.value(key, kind or signatures.parameter(name, key))
        end = self.parameter_end
        if self.has_cdata and (yield from expect(sink, CDATA)):
            end = CDATA_END
        try:
            yield from _text(sink, (f"\n{end}", end) if self.breaks else (end,), value.feed, drops_break=self.breaks)
            if end == CDATA_END:
                yield from expect(sink, self.parameter_end)
        except EndOfText as cut:
            if not cut.is_cut:
                value.finish()
            raise
        value.finish()


@dataclass(frozen=True, slots=True)
class KeyedCalls:
    """Reader of `name <key>k</key> <value>v</value> ... </call>`, the name behind the opening tag of the call.

    name_end: the tag behind the name, where there is one. section_end: the tag behind all calls.
    """

    call: str
    call_end: str
    key: tuple[str, str]
    value: tuple[str, str]
    name_end: str = ""
    section_end: str = ""
    untyped: frozenset[str] = EVERYTHING

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read the calls behind a start tag."""
        if start != self.call and not (yield from expect(sink, self.call)):
            raise ValueError("no function behind the tag")
        while True:
            yield from self._read_call(sink, signatures)
            next_call = self.call if self.section_end else ""
            if (yield from follow(sink, next_call, self.section_end)) != self.call:
                return

    def _read_call(self, sink: CallSink, signatures: Signatures) -> Reading[None]:
        markers = (self.name_end,) if self.name_end else (self.key[0], self.call_end)
        header, marker = yield from until(*markers, limit=HEADER_LENGTH)
        name = check_name(header)
        if marker == self.name_end:
            marker = yield from expect(sink, self.key[0], self.call_end)
            if not marker:
                raise ValueError(f"no parameters behind {name!r}")
        arguments = ArgumentsWriter(sink, name)
        try:
            while marker == self.key[0]:
                key = (yield from until(self.key[1]))[0].strip()
                if (yield from expect(sink, self.value[0])):
                    yield from self._read_value(sink, arguments.value(key, signatures.parameter(name, key)))
                marker = yield from expect(sink, self.key[0], self.call_end)
        except EndOfText as end:
            if end.is_cut:
                raise
        arguments.close()

    def _read_value(self, sink: CallSink, value: ValueWriter) -> Reading[None]:
        try:
            yield from _text(sink, (self.value[1],), value.feed)
        except EndOfText as cut:
            if not cut.is_cut:
                value.finish()
            raise
        value.finish()


def _text(
    sink: CallSink, markers: tuple[str, ...], keep: Callable[[str], None], *, drops_break: bool = False
) -> Reading[None]:
    """Read a value up to its end."""
    if drops_break and (yield) != "\n":
        sink.back(1)
    yield from until(*markers, keep=keep)


def _attributes(header: str) -> tuple[str, ValueType | None]:
    """The name in an opening tag, and the type of the value where the tag says it."""
    attributes = {name: double or single or bare for name, double, single, bare in ATTRIBUTE.findall(header)}
    name = next((attributes[key] for key in ("name", "key", "tool") if key in attributes), None)
    if name is None:
        return header.strip().strip("\"'"), None
    name = name.replace("&quot;", '"').replace("&amp;", "&")
    if "string" in attributes:
        return name, TEXT if attributes["string"] == "true" else NO_TEXT
    if kind := TYPES.get(attributes.get("type", "")):
        return name, ValueType(kind)
    return name, None
