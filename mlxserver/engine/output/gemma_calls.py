"""Reader of Gemma's calls: call:name{key:<|"|>text<|"|>,other:5,list:[...]}, keys without quotes, text between marks.

Text between marks is text, whatever the schema says; all else is typed by the schema, null in Python's spelling too.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxserver.engine.output.argument_types import Signatures, ValueType, ValueWriter, quote
from mlxserver.engine.output.call_reading import (
    HEADER_LENGTH,
    CallSink,
    Reading,
    check_name,
    expect,
    follow,
    solid,
    until,
)
from mlxserver.engine.output.schema_types import EVERYTHING
from mlxserver.engine.output.tagged_calls import TEXT

CALL = "call:"


@dataclass(frozen=True, slots=True)
class GemmaCalls:
    """Reader of one call or several, up to `end`. mark: stands on both sides of text."""

    end: str
    mark: str = '<|"|>'
    untyped: frozenset[str] = EVERYTHING

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read the calls behind a start tag."""
        if not (yield from expect(sink, CALL)):
            raise ValueError("no call behind the tag")
        while True:
            header, _ = yield from until("{", limit=HEADER_LENGTH)
            name = check_name(header)
            sink.begin(name)
            yield from self._read_object(sink, signatures.function(name))
            sink.end()
            if (yield from follow(sink, CALL, self.end)) != CALL:
                return

    def _read_object(self, sink: CallSink, kind: ValueType) -> Reading[None]:
        """Read an object behind its brace."""
        sink.write("{")
        marker = yield from expect(sink, "}")
        while not marker:
            if (yield from expect(sink, self.mark)):
                key, _ = yield from until(self.mark)
                yield from expect(sink, ":")
            else:
                key, _ = yield from until(":")
                key = key.strip()
            sink.write(f"{quote(key)}: ")
            marker = yield from self._read_value(sink, kind.member(key), "}")
            if marker == ",":
                sink.write(", ")
                marker = ""
        sink.write("}")

    def _read_array(self, sink: CallSink, kind: ValueType) -> Reading[None]:
        """Read an array behind its bracket."""
        sink.write("[")
        marker = yield from expect(sink, "]")
        while not marker:
            marker = yield from self._read_value(sink, kind, "]")
            if marker == ",":
                sink.write(", ")
                marker = ""
        sink.write("]")

    def _read_value(self, sink: CallSink, kind: ValueType, end: str) -> Reading[str]:
        """Read a value; the comma or bracket behind it."""
        if (yield from expect(sink, self.mark)):
            text = ValueWriter(sink.write, TEXT)
            yield from until(self.mark, keep=text.feed)
            text.finish()
        elif (first := (yield from expect(sink, "{", "["))) == "{":
            yield from self._read_object(sink, kind)
        elif first:
            yield from self._read_array(sink, kind.items)
        else:
            return (yield from self._read_scalar(sink, kind, end))
        marker = yield from solid()
        if marker not in (",", end):  # off the format: the construct ends here
            sink.back(1)
            marker = end
        return marker

    def _read_scalar(self, sink: CallSink, kind: ValueType, end: str) -> Reading[str]:
        text, marker = yield from until(",", end)
        sink.write(kind.json(text))
        return marker
