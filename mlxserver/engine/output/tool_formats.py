"""Tool formats: how models write their tool calls.

Rule 1: a model whose template writes calls keeps its own format (output/call_families.py).
Rule 2: the prompt of every other model describes the plain format (prompt/tool_text.py).
Rule 3: a forced call is a bare JSON array, which a grammar enforces whatever the model's own format is; where calls are
        messages with headers (harmony) it is one of those.
Rule 4: a model that writes a call as a JSON object between its own tags is understood in every format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mlxserver.engine.conversation import Tool
from mlxserver.engine.output.argument_types import Signatures
from mlxserver.engine.output.call_reading import CallSink, EndOfText, Reading
from mlxserver.engine.output.json_calls import sendable
from mlxserver.engine.output.named_json_calls import JsonCalls
from mlxserver.engine.output.schema_types import EVERYTHING


class CallReader(Protocol):
    """Reader of the calls of one format. untyped: types of a value that no schema describes."""

    @property
    def untyped(self) -> frozenset[str]:
        """JSON types of such a value."""

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read the calls behind a start tag, up to what ends them. Raises ValueError where there are none."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Tags around tool calls, and the reader of the text between them.

    start "": calls begin with the content, without a tag. end "": they go on to the end of the answer. is_native: the
    model's own format. is_json: each call is one JSON object of a name and arguments. other_starts: further texts that
    begin calls. is_guarded: nothing marks a call but its form, so only the functions of the request can be called.
    writer: writes a call as the model does, for templates that leave calls out; JSON between the tags without one.
    """

    start: str
    end: str
    reader: CallReader
    is_native: bool = False
    is_json: bool = False
    other_starts: tuple[str, ...] = ()
    is_guarded: bool = False
    name: str = ""
    writer: Callable[[str, Mapping[str, Any]], str] | None = None

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call as text that is read back."""
        if self.writer:
            return self.writer(name, arguments)
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return "\n".join(filter(None, [self.start, call, self.end]))

    @property
    def starts(self) -> tuple[str, ...]:
        """All texts that begin a call; empty where all content is calls."""
        return (*filter(None, [self.start]), *self.other_starts)

    def read(self, sink: CallSink, tools: Iterable[Tool], start: str) -> Reading[None]:
        """Read the calls behind a start tag, or from the beginning of the content."""
        text = ""
        while not text.strip() or text.strip() == "[":
            text += yield
        sink.back(len(text))
        is_object = text.replace("[", "").strip() == "{"
        reader = (
            JsonCalls(self.end, self.starts) if is_object and not isinstance(self.reader, JsonCalls) else self.reader
        )
        yield from reader.read(sink, Signatures(tools, self.reader.untyped), start)


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A whole call. arguments: JSON text of an object. id: the model's own, where its format has one."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ParsedCalls:
    """Reader of a format that only mlx-lm knows: its parser gets the text up to `end` once that has come."""

    end: str
    parser: Callable[[str, Any], Any]
    untyped: frozenset[str] = EVERYTHING

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read the calls behind a start tag."""
        body = ""
        try:
            while not self.end or not body.endswith(self.end):
                body += yield
        except EndOfText as cut:
            if cut.is_cut and self.end:
                raise
        for call in self.parse(body.removesuffix(self.end), signatures.tools):
            sink.begin(call.name, call.id)
            sink.write(call.arguments)
            sink.end()

    def parse(self, body: str, tools: Iterable[Tool]) -> list[ParsedCall]:
        """The calls between two tags, at least one. Raises ValueError."""
        try:
            found = self.parser(body.strip(), [_for_parser(tool) for tool in tools])
            calls = [_check(call) for call in (found if isinstance(found, list) else [found])]
        except Exception as error:  # mlx-lm's parsers let any error through
            raise ValueError(f"{body!r} is no tool call: {error}") from error
        if not calls:
            raise ValueError(f"{body!r} has no tool call")
        return calls


def parsed_format(start: str, end: str, parser: Callable[[str, Any], Any]) -> ToolFormat:
    """The format of one of mlx-lm's parsers."""
    return ToolFormat(start, end, ParsedCalls(end, parser), is_native=True)


def _for_parser(tool: Tool) -> dict[str, Any]:
    """A tool in which a parser finds the parameters that a function without any may leave out."""
    return {"type": "function", "function": {"parameters": {}, **tool.function}}


def _check(call: Any) -> ParsedCall:
    name, arguments, own_id = call["name"], call.get("arguments", {}), call.get("id")
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError(f"{call!r}: expected a name and an object of arguments")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return ParsedCall(sendable(name), sendable(text), sendable(own_id) if isinstance(own_id, str) and own_id else None)


def json_format(start: str, end: str, **options: Any) -> ToolFormat:
    """A format of JSON objects, or lists of them, between tags."""
    return ToolFormat(start, end, JsonCalls(end, (start,) if start else ()), **options)


PLAIN = json_format("<tool_call>", "</tool_call>", is_json=True, name="plain")
FORCED = json_format("", "", name="forced")
