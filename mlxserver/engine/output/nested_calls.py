"""Reader of MiniMax M3's calls: a parameter is an element named after it, a list or an object elements inside it.

Before each tag stands a mark, which text does not contain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlxserver.engine.output.argument_types import Signatures, ValueType, ValueWriter, quote
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
from mlxserver.engine.output.schema_types import EVERYTHING
from mlxserver.engine.output.tagged_calls import ArgumentsWriter

ITEM = "item"
EMPTY = {frozenset({"array"}): "[]", frozenset({"object"}): "{}"}


@dataclass(frozen=True, slots=True)
class NestedCalls:
    """Reader of `<invoke name="f"> <key>value</key> ... </invoke>`, `mark` before each tag."""

    mark: str
    untyped: frozenset[str] = EVERYTHING

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read the calls behind a start tag."""
        invoke, end = f'{self.mark}<invoke name="', f"{self.mark}</tool_call>"
        if start != invoke and not (yield from expect(sink, invoke)):
            raise ValueError("no function behind the tag")
        while True:
            name, _ = yield from until('">', limit=HEADER_LENGTH)
            yield from self._read_call(sink, signatures, check_name(name))
            if (yield from follow(sink, invoke, end)) != invoke:
                return

    def _read_call(self, sink: CallSink, signatures: Signatures, name: str) -> Reading[None]:
        if not (yield from expect(sink, f"{self.mark}<")):
            raise ValueError(f"no parameters behind {name!r}")
        arguments = ArgumentsWriter(sink, name)
        try:
            while (tag := (yield from until(">"))[0]) != "/invoke":
                yield from self._read_value(sink, arguments, tag, signatures.parameter(name, tag))
                if not (yield from expect(sink, f"{self.mark}<")):
                    break
        except EndOfText as end:
            if end.is_cut:
                raise
        arguments.close()

    def _read_value(self, sink: CallSink, arguments: ArgumentsWriter, tag: str, kind: ValueType) -> Reading[None]:
        opening, closing = f"{self.mark}<{tag}>", f"{self.mark}</{tag}>"
        if kind.is_text:
            value = arguments.value(tag, kind)
            yield from _text(closing, value)
            return
        arguments.key(tag)
        text, depth = "", 1
        while depth:
            part, marker = yield from until(closing, opening)
            depth += 1 if marker == opening else -1
            text += part + (marker if depth else "")
        sink.write(self._json(text, kind))

    def _json(self, text: str, kind: ValueType) -> str:
        """The JSON text of what stands in an element."""
        if not text.strip().startswith(f"{self.mark}<") or not kind.types & {"array", "object"}:
            return EMPTY.get(kind.types, "") if not text.strip() and kind.types in EMPTY else kind.json(text)
        children = list(self._children(text))
        if children and (kind.types == {"array"} or all(tag == ITEM for tag, _ in children)):
            return f"[{', '.join(self._json(inner, kind.items) for _, inner in children)}]"
        fields = [f"{quote(tag)}: {self._json(inner, kind.member(tag))}" for tag, inner in children]
        return f"{{{', '.join(fields)}}}"

    def _children(self, text: str) -> Iterator[tuple[str, str]]:
        """The elements that stand side by side in `text`: their tags, and what is in them."""
        opening = f"{self.mark}<"
        while opening in text:
            tag, _, rest = text.partition(opening)[2].partition(">")
            first, last = f"{self.mark}<{tag}>", f"{self.mark}</{tag}>"
            end, depth = 0, 1
            while depth:
                closed = rest.find(last, end)
                if closed < 0:
                    return
                opened = rest.find(first, end, closed)
                depth += -1 if opened < 0 else 1
                end = closed + len(last) if opened < 0 else opened + len(first)
            yield tag, rest[: end - len(last)]
            text = rest[end:]


def _text(closing: str, value: ValueWriter) -> Reading[None]:
    """Read a value that is text up to its end."""
    try:
        yield from until(closing, keep=value.feed)
    except EndOfText as cut:
        if not cut.is_cut:
            value.finish()
        raise
    value.finish()
