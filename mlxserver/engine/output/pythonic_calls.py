"""Reader of calls written as Python: [f(a=1, b='x'), g()].

Rule 1: templates write text between quotes as it is, with quotes and line breaks inside. So a quote ends the text only
        where another argument, or the end of the call, is behind it.
Rule 2: text between quotes is text, whatever the schema says; all else is typed by the schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mlxserver.engine.output.argument_types import Signatures, ValueType
from mlxserver.engine.output.call_reading import (
    HEADER_LENGTH,
    CallSink,
    EndOfText,
    Reading,
    check_name,
    expect,
    follow,
    skip_tail,
    solid,
    until,
)
from mlxserver.engine.output.json_calls import sendable
from mlxserver.engine.output.schema_types import EVERYTHING
from mlxserver.engine.output.tagged_calls import TEXT, ArgumentsWriter

# Each \Z stands where the text may still go on.
BEHIND_QUOTE = re.compile(
    r"\s*(?:\Z|,\s*(?:\Z|[^\W\d]\w*\s*(?:\Z|(?P<argument>=)))"
    r"|\)\s*(?:\Z|,\s*(?:\Z|[^\W\d][\w.-]*(?:\Z|(?P<call>\()))|\]\s*(?:\Z|(?P<end><))))"
)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "'": "'", '"': '"', "\n": ""}
CODES = {"x": 2, "u": 4, "U": 8}
OPENING, CLOSING = "[{(", "]})"


@dataclass(frozen=True, slots=True)
class PythonicCalls:
    """Reader of a list of calls, up to `end`.

    needs_list: a call outside a list is none, and text may follow the list.
    """

    end: str = ""
    needs_list: bool = False
    untyped: frozenset[str] = EVERYTHING

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read the calls behind a start tag."""
        if (yield from solid()) != "[":
            if self.needs_list:
                raise ValueError("no list of calls")
            sink.back(1)  # one call without its list
        marker = ","
        while marker == ",":
            name = yield from _read_name()
            yield from self._read_call(sink, signatures, name)
            marker = yield from follow(sink, ",", "]", self.end)
        if self.needs_list:
            yield from follow(sink, self.end)
        elif marker != self.end:
            yield from skip_tail(sink, self.end, ())

    def _read_call(self, sink: CallSink, signatures: Signatures, name: str) -> Reading[None]:
        key = ""
        if not (yield from expect(sink, ")")):
            key, _ = yield from until("=", limit=HEADER_LENGTH)
            if not key.strip().isidentifier():
                raise ValueError(f"{key!r} is no name of an argument")
        arguments = ArgumentsWriter(sink, name)
        try:
            while key:
                yield from self._read_value(sink, arguments, key.strip(), signatures.parameter(name, key.strip()))
                key = ""
                if (yield from expect(sink, ",", ")")) == "," and not (yield from expect(sink, ")")):
                    key, _ = yield from until("=")
        except EndOfText as end:
            if end.is_cut:
                raise
        arguments.close()

    def _read_value(self, sink: CallSink, arguments: ArgumentsWriter, key: str, kind: ValueType) -> Reading[None]:
        first = yield from solid()
        if first in "'\"":
            value = arguments.value(key, TEXT)
            try:
                yield from _read_text(sink, first, value.feed)
            except EndOfText as end:
                if not end.is_cut:
                    value.finish()
                raise
            value.finish()
            return
        written: list[str] = []
        yield from _read_expression(sink, first, written.append)
        text = "".join(written)
        arguments.key(key)
        sink.write((ValueType(EVERYTHING - {"string"}) if first in OPENING else kind).json(text))


def _read_name() -> Reading[str]:
    """Read a function's name and the bracket behind it. Raises ValueError at the first character of no name."""
    text = name = ""
    while (char := (yield)) != "(":
        text += char
        name = check_name(text) if text.strip() else ""
    return check_name(name)


def _read_text(sink: CallSink, quote: str, keep: Callable[[str], None]) -> Reading[None]:
    """Read the text behind an opening quote, and its end."""
    is_long = yield from _is_tripled(sink, quote)
    while True:
        char = yield
        if char == "\\":
            keep((yield from _read_escape(sink)))
        elif char != quote:
            keep(char)
        elif (yield from _is_tripled(sink, quote) if is_long else _is_end(sink)):
            return
        else:
            keep(char)


def _is_tripled(sink: CallSink, quote: str) -> Reading[bool]:
    """Whether two more quotes behind this one make three of them; they are taken then."""
    if (yield) != quote:
        sink.back(1)
        return False
    try:
        is_third = (yield) == quote
    except EndOfText:
        sink.back(1)
        return False
    if not is_third:
        sink.back(2)
    return is_third


def _is_end(sink: CallSink) -> Reading[bool]:
    """Whether the text ends at the quote that was read last; what is behind it is read back."""
    behind = ""
    while True:
        try:
            behind += yield
        except EndOfText:
            sink.back(len(behind))
            return True
        found = BEHIND_QUOTE.match(behind)
        if found is None or found.lastgroup:
            sink.back(len(behind))
            return found is not None


def _read_escape(sink: CallSink) -> Reading[str]:
    """The text that a backslash and what follows it stand for; both as they are where Python knows no such escape."""
    char = yield
    if char in ESCAPES:
        return ESCAPES[char]
    digits = ""
    while len(digits) < CODES.get(char, 0):
        digit = yield
        if digit not in "0123456789abcdefABCDEF":
            sink.back(1)
            break
        digits += digit
    if digits and len(digits) == CODES[char] and int(digits, 16) <= 0x10FFFF:
        return sendable(chr(int(digits, 16)))
    return f"\\{char}{digits}"


def _read_expression(sink: CallSink, first: str, keep: Callable[[str], None]) -> Reading[None]:
    """Read a number, a word, a list or a dictionary that begins with `first`; the comma or bracket behind it stays."""
    char, depth, quote, is_escaped = first, 0, "", False
    while quote or depth or char not in ",)":
        keep(char)
        if quote:
            quote = quote if is_escaped or char != quote else ""
            is_escaped = char == "\\" and not is_escaped
        elif char in "'\"":
            quote = char
        else:
            depth += (char in OPENING) - (char in CLOSING)
        char = yield
    sink.back(1)
