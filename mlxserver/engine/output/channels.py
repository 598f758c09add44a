"""Channel parser: messages with headers, such as those of OpenAI's harmony format -> reasoning, answer and calls.

Rule 1: a header says what its message is. Its text and all marks are dropped, bodies are emitted as they come.
Rule 2: text where a header would be is content; so is the body of a header that lacks its end.
Rule 3: two messages of one channel have a blank line between them.
Rule 4: any cut of the same text gives the same pieces. Only headers and what may be part of a mark are held back.

Harmony: https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from mlxserver.engine.events import Channel, ToolCallDelta
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.reasoning_formats import ChannelFormat
from mlxserver.engine.output.splitter import Piece
from mlxserver.engine.output.stop_strings import overlap

MAX_HEADER, MAX_MARK = 256, 16  # characters; what is longer is no header
NAMESPACE = "functions."
RECIPIENT = "to="
SEPARATOR = "\n\n"


class ChannelState(Enum):
    """Where the output is."""

    BETWEEN = "before a header, or inside one"
    CONTENT = "inside the body of a message to the user"
    REASONING = "inside the body of a message to the model itself"
    CALL = "inside the arguments of a call"


@dataclass(frozen=True, slots=True)
class _Syntax:
    """Texts and patterns of a format.

    headers: with what a header begins. stops: what ends a body. header_end, body_end: the first of such texts.
    cut_header: a header that lacks its end.
    """

    headers: tuple[str, ...]
    stops: tuple[str, ...]
    header_end: re.Pattern[str]
    body_end: re.Pattern[str]
    cut_header: re.Pattern[str]


@functools.cache
def _syntax(marks: ChannelFormat) -> _Syntax:
    openings = tuple(filter(None, (marks.start, marks.new_header)))
    stops = (*openings, *marks.ends)
    recipient = rf"\s*(?:{RECIPIENT}[^\s<]+)?"
    channel = rf"\s*(?:{re.escape(marks.new_header)}\s*[\w.-]*)?" if marks.new_header else ""
    return _Syntax(
        (*openings, marks.message, RECIPIENT),
        stops,
        _any_of((marks.start, marks.message, *marks.ends)),
        _any_of(stops),
        re.compile(rf"(?:{re.escape(marks.start)})?\s*(?:assistant\b)?{recipient}{channel}{recipient}\s*"),
    )


class ChannelParser:
    """Parser of one choice.

    starts_inside: the prompt ends inside a message of reasoning. tools: names of those that may be called; calls of
    functions by their namespace count whenever there is one. Without `parallel` only the first call is emitted. index:
    of the choice.
    """

    is_calling = False
    holds_call = False

    def __init__(
        self,
        marks: ChannelFormat,
        starts_inside: bool = False,
        *,
        tools: Collection[str] = (),
        parallel: bool = True,
        index: int = 0,
    ) -> None:
        self._marks = marks
        self._tools = tools
        self._parallel = parallel
        self._index = index
        self._state = ChannelState.REASONING if starts_inside else ChannelState.BETWEEN
        self._is_beginning = not starts_inside
        self._is_flushed = False
        self._held = TokenText()
        self._call_name = ""  # of a call of which nothing was emitted yet
        self._blank = ""  # white space that a call may end in
        self._num_calls = 0
        self._is_silent = True  # nothing of this message was emitted yet
        self._emitted: list[Channel] = []  # the channels of messages, in order
        self._pieces: list[Piece] = []
        self._syntax = _syntax(marks)

    @property
    def is_thinking(self) -> bool:
        """Whether the output is inside the reasoning after the text fed last."""
        return self._state is ChannelState.REASONING

    @property
    def is_closing(self) -> bool:
        """Whether the text fed last ends in what may be the beginning of the closing mark."""
        return self.is_thinking and self._overlap(self._held.text) > 0

    @property
    def is_unclosed(self) -> bool:
        """Whether the output ended in its reasoning, or behind it without another message."""
        return self._emitted[-1:] == ["reasoning"] and self._state is not ChannelState.CALL

    def feed(self, text: TokenText | str) -> list[Piece]:
        """Pieces that `text` decides, in order."""
        self._held += text
        while self._read_header() if self._state is ChannelState.BETWEEN else self._read_body():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def flush(self) -> list[Piece]:
        """Pieces of the text that is held back, at the end of the output."""
        self._is_flushed = True
        pieces = self.feed("")
        self._end_body()
        return pieces + self.feed("")

    def _read_header(self) -> bool:
        """Drop what stands between two messages, and the next header."""
        text = self._held.text.lstrip()
        gap = len(self._held) - len(text)
        if not text:
            return self._is_flushed and self._is_beginning and gap > 0 and self._enter(ChannelState.CONTENT, 0)
        if end := next((end for end in self._marks.ends if text.startswith(end)), ""):
            self._held = self._held.drop(gap + len(end))
            return True
        if text.startswith(self._syntax.headers):
            return self._find_body(text, gap)
        marks = (*self._syntax.headers, *self._marks.ends)
        if not self._is_flushed and any(mark.startswith(text) for mark in marks):
            return False
        return self._enter(ChannelState.CONTENT, 0 if self._is_beginning else gap)

    def _find_body(self, text: str, gap: int) -> bool:
        """Enter the body of the header with which `text` begins."""
        end = self._syntax.header_end.search(text, len(self._marks.start) if text.startswith(self._marks.start) else 0)
        if end is None and len(text) <= MAX_HEADER + MAX_MARK and not self._is_flushed:
            return False
        if end and end.start() <= MAX_HEADER and end[0] == self._marks.message:
            return self._enter(self._kind(text[: end.start()]), gap + end.end())
        header = self._syntax.cut_header.match(text)
        assert header  # it matches the empty text, too
        return self._enter(self._kind(header[0]), gap + header.end())

    def _kind(self, header: str) -> ChannelState:
        """What the message with this header is; of several channels in it the last one counts."""
        recipients = self._marks.call.findall(header) if self._tools and self._marks.call else ()
        for name in recipients:
            if name.startswith(NAMESPACE) or name in self._tools:
                self._call_name = name.removeprefix(NAMESPACE)
                return ChannelState.CALL
        channel = header[max(header.rfind(self._marks.new_header), 0) :] if self._marks.new_header else header
        return ChannelState.REASONING if self._marks.reasoning.search(channel) else ChannelState.CONTENT

    def _enter(self, state: ChannelState, dropped: int) -> bool:
        self._held = self._held.drop(dropped)
        self._state = state
        self._is_beginning = False
        self._is_silent = True
        return True

    def _read_body(self) -> bool:
        text = self._held.text
        end = self._syntax.body_end.search(text)
        if end is None:
            self._emit(len(text) if self._is_flushed else len(text) - self._overlap(text))
            return False
        self._emit(end.start())
        self._end_body()
        if end[0] in self._marks.ends:
            self._held = self._held.drop(len(end[0]))
        return True

    def _end_body(self) -> None:
        """Go on behind the message. A call without arguments has {}."""
        if self._state is ChannelState.CALL:
            if self._call_name:
                self._emit_arguments("{}")
            self._blank = ""
            self._num_calls += 1
        self._state = ChannelState.BETWEEN

    def _emit(self, length: int) -> None:
        """Emit the first `length` characters that are held."""
        text, self._held = self._held.cut(length)
        if self._state is ChannelState.CALL:
            self._emit_arguments(text.text)
        elif text:
            channel: Channel = "reasoning" if self.is_thinking else "content"
            if self._is_silent and channel in self._emitted:
                text = TokenText(SEPARATOR) + text
            if self._is_silent:
                self._emitted.append(channel)
            self._is_silent = False
            self._pieces.append((channel, text))

    def _emit_arguments(self, text: str) -> None:
        """Emit a part of a call's arguments, without the white space around all of them."""
        whole = self._blank + text
        arguments = whole.rstrip()
        self._blank = whole[len(arguments) :]
        arguments = arguments.lstrip() if self._call_name else arguments
        if arguments and (self._parallel or not self._num_calls):
            call_id = f"call_{secrets.token_hex(12)}" if self._call_name else None
            self._pieces.append(
                ToolCallDelta(self._num_calls, arguments, call_id, self._call_name or None, self._index)
            )
        if arguments:
            self._call_name = ""

    def _overlap(self, text: str) -> int:
        return max(overlap(text, mark) for mark in self._syntax.stops)


def _any_of(marks: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, marks)))
