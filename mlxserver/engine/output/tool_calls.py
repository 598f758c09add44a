"""Tool call parser: the content of one choice -> its text and its tool calls.

Rule 1: text between the tags of a call is no content, nor is the white space beside a call; all other text is.
Rule 2: calls in JSON are emitted while the model writes them; other formats are parsed at their end tag.
Rule 3: what looked like a call and is none is content, unchanged.
Rule 4: any cut of the same text gives the same content and calls.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from enum import Enum

from mlxserver.engine.conversation import Tool
from mlxserver.engine.events import ToolCallDelta
from mlxserver.engine.output.json_calls import CallScanner, ScanState
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.stop_strings import overlap
from mlxserver.engine.output.tool_formats import FORCED, ToolFormat
from mlxserver.engine.requests import ChatPrompt, GenerationRequest

JSON_BEGINNING = re.compile(r"\s*(?:\[\s*)?(\{)?")
BETWEEN_CALLS = " \t\r\n,]"


class ParserState(Enum):
    """What the parser expects next."""

    CONTENT = "content, or a start tag"
    OPENED = "the beginning of calls, in JSON or not"
    CALL = "a call in JSON"
    NEXT = "another call in JSON, or the end of them"
    BODY = "calls in another format"
    TAIL = "what is left up to the end tag"


class ToolCallParser:
    """Parser of the content of one choice. `completed` counts the calls that are whole.

    tools: those that may be called. Without `parallel` nothing is emitted after the first call. index: of the choice.
    """

    def __init__(
        self, tool_format: ToolFormat, tools: Sequence[Tool] = (), *, parallel: bool = True, index: int = 0
    ) -> None:
        self.completed = 0
        self._format = tool_format
        self._tools = tools
        self._parallel = parallel
        self._index = index
        self._state = ParserState.CONTENT if tool_format.start else ParserState.OPENED
        self._held = TokenText()
        self._read = 0  # how many characters of what is held have been understood
        self._trims_left = False
        self._begun = 0
        self._scanner = CallScanner()
        self._is_emitted = False  # the call that is being read; what is emitted is no longer held
        self._tail = re.compile(f"{re.escape(tool_format.end)}|(?={re.escape(tool_format.start)})")
        self._events: list[TokenText | ToolCallDelta] = []
        self._readers = {
            ParserState.CONTENT: self._read_content,
            ParserState.OPENED: self._read_opening,
            ParserState.CALL: self._read_call,
            ParserState.NEXT: self._read_next,
            ParserState.BODY: self._read_body,
            ParserState.TAIL: self._read_tail,
        }

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be emitted."""
        return self.completed > 0 and not self._parallel

    def feed(self, text: TokenText | str) -> list[TokenText | ToolCallDelta]:
        """The content and the pieces of calls that `text` decides, in order."""
        self._held += text
        while not self.is_done and (state := self._readers[self._state]()):
            self._state = state
        return self._take_events()

    def flush(self, *, is_cut: bool) -> list[TokenText | ToolCallDelta]:
        """The events of what is held back, at the end of the output. is_cut: the model has not ended by itself."""
        if self._state is ParserState.BODY and not (is_cut and self._format.end):
            self._parse_body(len(self._held), len(self._held))
        elif self._state is ParserState.CALL and self._is_emitted:
            self.completed += self._scanner.has_arguments
            self._drop(len(self._held))
        elif self._state is ParserState.TAIL or self.is_done:
            self._drop(len(self._held))
        self._emit(len(self._held))
        return self._take_events()

    def _read_content(self) -> ParserState | None:
        """Emit the text before a start tag."""
        text, tag = self._held.text, self._format.start
        start = text.find(tag) if tag else -1
        if start < 0:
            self._emit(len(text[: len(text) - overlap(text, tag)].rstrip()))
            return None
        length = len(text[:start].rstrip())
        self._emit(length)
        self._read = start - length + len(tag)
        return ParserState.OPENED

    def _read_opening(self) -> ParserState | None:
        beginning = JSON_BEGINNING.match(self._held.text, self._read)
        assert beginning  # it matches the empty text, too
        if beginning[1]:
            return self._enter_call(beginning.end())
        return None if beginning.end() == len(self._held) else ParserState.BODY

    def _enter_call(self, read: int) -> ParserState:
        self._read = read
        self._scanner = CallScanner()
        self._is_emitted = False
        return ParserState.CALL

    def _read_call(self) -> ParserState | None:
        """Emit the arguments as they come. Until then the call is held back, since it may be none."""
        self._read += self._scanner.feed(self._held.text[self._read :])
        if arguments := self._scanner.take_arguments():
            if self._is_emitted:
                self._events.append(ToolCallDelta(self._begun - 1, arguments, index=self._index))
            else:
                self._begin_call(self._scanner.name, arguments)
            self._is_emitted = True
        if self._scanner.state is ScanState.MALFORMED:
            self._emit(self._read)
            return ParserState.CONTENT
        if self._is_emitted:
            self._drop(self._read)
        if self._scanner.state is ScanState.READING:
            return None
        self.completed += 1
        return ParserState.NEXT

    def _read_next(self) -> ParserState | None:
        self._drop(len(self._held) - len(self._held.text.lstrip(BETWEEN_CALLS)))
        if not self._held:
            return None
        return self._enter_call(1) if self._held.text[0] == "{" else ParserState.TAIL

    def _read_body(self) -> ParserState | None:
        end = self._held.text.find(self._format.end, self._read) if self._format.end else -1
        return None if end < 0 else self._parse_body(end, end + len(self._format.end))

    def _parse_body(self, end: int, behind: int) -> ParserState:
        """Emit the calls that end at `end`, or if there are none all text up to `behind` as content."""
        try:
            calls = self._format.parse(self._held.text[self._read : end], self._tools)
        except ValueError:
            self._emit(behind)
            return ParserState.CONTENT
        self._drop(behind)
        for call in calls if self._parallel else calls[:1]:
            self._begin_call(call.name, call.arguments, call.id)
            self.completed += 1
        self._trims_left = True
        return ParserState.CONTENT

    def _read_tail(self) -> ParserState | None:
        """Drop everything up to the end tag, or to a start tag where the model leaves the end tag out."""
        text = self._held.text
        tag = self._tail.search(text)
        if tag is None:
            self._drop(len(text) - max(overlap(text, self._format.end), overlap(text, self._format.start)))
            return None
        self._drop(tag.end())
        self._trims_left = True
        return ParserState.CONTENT

    def _begin_call(self, name: str, arguments: str, own_id: str | None = None) -> None:
        call_id = own_id or f"call_{secrets.token_hex(12)}"
        self._events.append(ToolCallDelta(self._begun, arguments, call_id, name, self._index))
        self._begun += 1

    def _emit(self, length: int) -> None:
        """Emit the first `length` characters that are held as content, less the white space behind a call."""
        text, self._held = self._held.cut(length)
        self._read = 0
        if self._trims_left:
            text = text.drop(length - len(text.text.lstrip()))
            self._trims_left = not text
        if text:
            self._events.append(text)

    def _drop(self, length: int) -> None:
        self._held = self._held.drop(length)
        self._read = 0

    def _take_events(self) -> list[TokenText | ToolCallDelta]:
        events, self._events = self._events, []
        return events


def make_tool_parser(tool_format: ToolFormat, request: GenerationRequest, index: int = 0) -> ToolCallParser | None:
    """The parser of the calls of one choice; None for a request without tools, or whose tools may not be called."""
    choice = request.tool_choice
    if not isinstance(request.prompt, ChatPrompt) or not request.prompt.tools or choice.mode == "none":
        return None
    called = tool_format if choice.mode == "auto" else FORCED
    return ToolCallParser(called, request.prompt.tools, parallel=choice.parallel, index=index)
