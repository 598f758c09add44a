"""Reading of tool calls, character by character: what the readers of all formats share.

Rule 1: a reader is a generator that takes one character at each yield, so that any cut of a text gives the same calls.
Rule 2: a reader raises ValueError where the text is no call. What it has not dropped by then is content.
Rule 3: between begin() and end() of a call nothing raises ValueError: arguments that were emitted become valid JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

from mlxserver.engine.output.stop_strings import overlap

Value = TypeVar("Value")
Reading = Generator[None, str, Value]  # takes a character at each yield

HEADER_LENGTH = 256  # most characters of a name with what belongs to it: longer text is no call


class EndOfText(Exception):
    """End of the output inside of calls. is_cut: the model has not ended it by itself."""

    def __init__(self, *, is_cut: bool) -> None:
        super().__init__("the output ends inside of a call")
        self.is_cut = is_cut


class CallSink(Protocol):
    """What a reader has understood."""

    def begin(self, name: str, own_id: str | None = None) -> None:
        """Begin a call. own_id: the model's own id. Raises ValueError where there can be no such call."""

    def write(self, arguments: str) -> None:
        """Emit a piece of the call's arguments, JSON text of an object."""

    def end(self) -> None:
        """End the call: its arguments are whole."""

    def drop(self) -> None:
        """Take what has been read so far for no content, whatever comes behind it."""

    def back(self, length: int) -> None:
        """Read the last `length` characters once more."""


def solid() -> Reading[str]:
    """The next character that is no white space."""
    while (char := (yield)).isspace():
        pass
    return char


def until(*markers: str, keep: Callable[[str], None] | None = None, limit: int = 0) -> Reading[tuple[str, str]]:
    """The text up to the first marker, and that marker; of two that end together the longer one.

    keep: gets the text as it comes, in place of the result. limit: most characters of the text, ValueError beyond it.
    """
    longest_first = sorted(markers, key=len, reverse=True)
    beginnings = {marker[0] for marker in markers}
    text = ""
    while True:
        char = yield
        if keep and not text and char not in beginnings:
            keep(char)
            continue
        text += char
        if found := next((marker for marker in longest_first if text.endswith(marker)), None):
            rest = text[: len(text) - len(found)]
            if keep and rest:
                keep(rest)
            return ("" if keep else rest), found
        if keep:
            held = max(overlap(text, marker) for marker in markers)
            if len(text) > held:
                keep(text[: len(text) - held])
            text = text[len(text) - held :]
        elif limit and len(text) > limit + len(longest_first[0]):
            raise ValueError(f"{text!r} goes on without {markers}")


def expect(sink: CallSink, *markers: str) -> Reading[str]:
    """The marker that comes next, behind white space; empty, with all of it read back, where something else comes."""
    read, text = 0, ""
    while True:
        char = yield
        read += 1
        if not text and char.isspace():
            continue
        text += char
        if text in markers:
            return text
        if not any(marker.startswith(text) for marker in markers):
            sink.back(read)
            return ""


def follow(sink: CallSink, *markers: str) -> Reading[str]:
    """The marker that comes next behind a whole call, as expect(); empty at the end of the output, too."""
    try:
        marker = yield from expect(sink, *[marker for marker in markers if marker])
    except EndOfText:
        sink.drop()
        return ""
    if marker:
        sink.drop()
    return marker


def skip_tail(sink: CallSink, end: str, starts: tuple[str, ...]) -> Reading[None]:
    """Drop everything up to the end tag, or to a start tag where the model leaves the end tag out."""
    if not end:
        return
    try:
        _, marker = yield from until(end, *starts, keep=lambda _: sink.drop())
    except EndOfText:
        sink.drop()
        return
    if marker == end:
        sink.drop()
    else:
        sink.back(len(marker))


def check_name(text: str) -> str:
    """A function's name out of a header. Raises ValueError."""
    name = text.strip().strip("\"'")
    if not name or len(name) > HEADER_LENGTH or any(char.isspace() or char in "<>{}()\"'" for char in name):
        raise ValueError(f"{text!r} is no name of a function")
    return name
