"""Readers of calls in JSON: objects with a name and arguments, and arguments alone behind their function's name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mlxserver.engine.output.argument_types import Signatures
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
from mlxserver.engine.output.json_calls import CallScanner, ScanState, container, string
from mlxserver.engine.output.schema_types import EVERYTHING

SOLAR_NAME = "<|tool_call:name|>"
BETWEEN_CALLS = " \t\r\n,;]"
KIMI_ID = re.compile(r"(?:functions\.)?(.+?):\d+")
KIND = "function"
ID_MARK = "[CALL_ID]"
Header = Callable[[str], tuple[str, str | None]]


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """Reader of objects with a name and arguments, in a list or one behind the other, up to `end`.

    is_keyed: the name is the object's only key, the arguments its value.
    """

    end: str = ""
    starts: tuple[str, ...] = ()
    is_keyed: bool = False
    untyped: frozenset[str] = EVERYTHING

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read the calls behind a start tag."""
        char = yield from solid()
        if char == "[":
            char = yield from solid()
        if char != "{":
            raise ValueError("no object behind the tag")
        while char == "{":
            yield from _read_keyed(sink) if self.is_keyed else _read_object(sink)
            while (char := (yield)) in BETWEEN_CALLS:
                sink.drop()
        sink.back(1)
        yield from skip_tail(sink, self.end, self.starts)


def _read_object(sink: CallSink) -> Reading[None]:
    scanner, is_begun = CallScanner(), False
    try:
        while scanner.state is ScanState.READING:
            used = scanner.feed((yield))
            if arguments := scanner.take_arguments():
                if not is_begun:
                    sink.begin(scanner.name)
                    is_begun = True
                sink.write(arguments)
            if is_begun:
                sink.drop()
    except EndOfText:
        if not is_begun or not scanner.has_arguments:
            raise
    else:
        if scanner.state is ScanState.MALFORMED:
            raise ValueError("this is no call")
        if not used:
            sink.back(1)
    sink.end()


def _read_keyed(sink: CallSink) -> Reading[None]:
    name = yield from string((yield from solid()))
    if (yield from solid()) != ":":
        raise ValueError("no arguments behind a name")
    yield from _read_arguments(sink, check_name(name))
    yield from follow(sink, "}")


@dataclass(frozen=True, slots=True)
class NamedJsonCalls:
    """Reader of `call name separator {arguments} call_end`, up to `end`.

    header: text before the separator -> the function's name, and the model's own id of the call. has_kinds: "function"
    may stand in the place of the name, which is then behind the separator, the arguments behind it as Markdown.
    """

    call: str
    separator: str
    call_end: str = ""
    end: str = ""
    header: Header = lambda text: (check_name(text), None)
    has_kinds: bool = False
    untyped: frozenset[str] = EVERYTHING

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read the calls behind a start tag."""
        if start != self.call and not (yield from expect(sink, self.call)):
            raise ValueError("no call behind the tag")
        while True:
            header, _ = yield from until(self.separator, limit=HEADER_LENGTH)
            yield from self._read_call(sink, *self.header(header))
            marker = yield from follow(sink, self.call_end, self.call, self.end)
            if self.call_end and marker == self.call_end:
                marker = yield from follow(sink, self.call, self.end)
            if marker != self.call:
                return

    def _read_call(self, sink: CallSink, name: str, own_id: str | None) -> Reading[None]:
        first = yield from solid()
        sink.back(1)
        if first == "{":
            yield from _read_arguments(sink, name, own_id)
        elif self.has_kinds and name == KIND:
            text, _ = yield from until("{", limit=HEADER_LENGTH)
            sink.back(1)
            yield from _read_arguments(sink, check_name(text.split("```")[0]))
            yield from follow(sink, "```")
        elif self.call_end and (yield from expect(sink, self.call_end)):
            sink.back(len(self.call_end))
            sink.begin(name, own_id)
            sink.write("{}")
            sink.end()
        else:
            raise ValueError(f"no arguments behind {name!r}")


def _read_arguments(sink: CallSink, name: str, own_id: str | None = None) -> Reading[None]:
    if (first := (yield from solid())) != "{":
        raise ValueError(f"no object behind {name!r}")
    sink.begin(name, own_id)
    yield from container(first, sink.write)
    sink.end()


def kimi_header(text: str) -> tuple[str, str | None]:
    """Name and id of Kimi's `functions.name:0`."""
    found = KIMI_ID.fullmatch(text.strip())
    return (check_name(found[1]), text.strip()) if found else (check_name(text.removeprefix("functions.")), None)


def mistral_header(text: str) -> tuple[str, str | None]:
    """Name and id of Mistral's `name[CALL_ID]id`."""
    name, _, own_id = text.partition(ID_MARK)
    return check_name(name), own_id.strip() or None


def solar_header(text: str) -> tuple[str, str | None]:
    """Name and id of Solar's `id<|tool_call:name|>name`."""
    own_id, _, name = text.rpartition(SOLAR_NAME)
    return check_name(name), own_id.strip() or None
