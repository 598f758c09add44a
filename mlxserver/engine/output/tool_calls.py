"""Tool call parser: the content of one choice -> its text and its tool calls.

Rule 1: text between the tags of a call is no content, nor is the white space beside a call; all other text is.
Rule 2: calls are emitted while the model writes them (output/call_reading.py).
Rule 3: what looked like a call and is none is content, unchanged.
Rule 4: any cut of the same text gives the same content and calls.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from mlxserver.engine.conversation import Tool
from mlxserver.engine.events import ToolCallDelta
from mlxserver.engine.output.call_reading import EndOfText, Reading
from mlxserver.engine.output.json_calls import sendable
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.stop_strings import overlap
from mlxserver.engine.output.tool_formats import FORCED, ToolFormat
from mlxserver.engine.requests import ChatPrompt, GenerationRequest


class ToolCallParser:
    """Parser of the content of one choice. `completed` counts the calls that are whole.

    tools: those that may be called. Without `parallel` nothing is emitted after the first call. index: of the choice.
    """

    def __init__(
        self, tool_format: ToolFormat, tools: Sequence[Tool] = (), *, parallel: bool = True, index: int = 0
    ) -> None:
        self._format = tool_format
        self._tools = tools
        names = [tool.name for tool in tools] if tool_format.is_guarded else None
        self._sink = _Sink(index, names, is_single=not parallel)
        self._held = TokenText()
        self._reader: Reading[None] | None = None  # of the calls that have begun
        self._opening = 0  # length of what begins them, start tag included
        self._trims_left = False
        self._events: list[TokenText | ToolCallDelta] = []
        if not tool_format.start:
            self._open(0, "")

    @property
    def completed(self) -> int:
        """Number of calls that are whole."""
        return self._sink.completed

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be emitted."""
        return self._sink.is_done

    def feed(self, text: TokenText | str) -> list[TokenText | ToolCallDelta]:
        """The content and the pieces of calls that `text` decides, in order."""
        self._held += text
        while not self.is_done and (self._read_calls() if self._reader else self._read_content()):
            pass
        return self._take_events()

    def flush(self, *, is_cut: bool) -> list[TokenText | ToolCallDelta]:
        """The events of what is held back, at the end of the output. is_cut: the model has not ended by itself."""
        while self._reader and not self.is_done:
            self._end_calls(self._reader, EndOfText(is_cut=is_cut))
            while not self.is_done and (self._read_calls() if self._reader else self._read_content()):
                pass
        if self.is_done:
            self._drop(len(self._held))
        self._emit(len(self._held))
        return self._take_events()

    def _read_content(self) -> bool:
        """Emit the text before a start tag, and open the calls behind it. Whether there is one."""
        text = self._held.text
        found = [(at, -len(tag), tag) for tag in self._format.starts if (at := text.find(tag)) >= 0]
        if not found:
            held = max((overlap(text, tag) for tag in self._format.starts), default=0)
            self._emit(len(text[: len(text) - held].rstrip()) if self._format.starts else len(text))
            return False
        start, _, tag = min(found)
        length = len(text[:start].rstrip())
        self._emit(length)
        self._open(start - length + len(tag), tag)
        return True

    def _open(self, length: int, tag: str) -> None:
        """Begin to read calls, behind `length` characters that are held."""
        self._reader = self._format.read(self._sink, self._tools, tag)
        next(self._reader)
        self._opening = self._sink.position = length
        self._sink.dropped = 0

    def _read_calls(self) -> bool:
        """Pass what is held to the reader. Whether it has come to an end before that of the text."""
        reader, sink, text = self._reader, self._sink, self._held.text
        assert reader
        length = len(text)
        try:
            while sink.position < length and not sink.is_done:
                sink.position += 1
                reader.send(text[sink.position - 1])
        except StopIteration:
            self._close(sink.position)
        except (ValueError, RecursionError):
            self._give_up()
        self._take_calls()
        return self._reader is None

    def _end_calls(self, reader: Reading[None], end: EndOfText) -> None:
        """Let the reader know that the text has ended."""
        try:
            reader.throw(end)
        except StopIteration:
            self._close(self._sink.position)
        except (EndOfText, ValueError, RecursionError):
            self._give_up()
        self._take_calls()

    def _close(self, position: int) -> None:
        """Go on with the content behind the calls."""
        self._reader = None
        self._sink.dropped = position

    def _give_up(self) -> None:
        """Go on with the content behind a start tag, or behind the last call. The rest of a call is no content."""
        self._reader = None
        if self._sink.is_open:
            self._sink.dropped = len(self._held)
        elif not self._sink.dropped:
            self._emit(self._opening)

    def _take_calls(self) -> None:
        """Take what the reader has understood, and drop the text that it has understood for good."""
        if events := self._sink.take_events():
            self._events += events
            self._trims_left = True
        if dropped := self._sink.dropped:
            self._drop(dropped)
            self._sink.position -= dropped
            self._sink.dropped = 0
            self._opening = 0

    def _emit(self, length: int) -> None:
        """Emit the first `length` characters that are held as content, less the white space behind a call."""
        text, self._held = self._held.cut(length)
        if self._trims_left:
            text = text.drop(length - len(text.text.lstrip()))
            self._trims_left = not text
        if text:
            self._events.append(text)

    def _drop(self, length: int) -> None:
        self._held = self._held.drop(length)

    def _take_events(self) -> list[TokenText | ToolCallDelta]:
        events, self._events = self._events, []
        return events


class _Sink:
    """What a reader has understood. position: of the text that is read, from the first character that is held.

    dropped: up to where the text is no content. names: of the functions that may be called; None for any. is_single:
    whether only one call is wanted.
    """

    def __init__(self, index: int, names: Sequence[str] | None, *, is_single: bool) -> None:
        self.position = self.dropped = 0
        self.completed = 0
        self.is_done = False  # no more calls are wanted
        self.is_open = False  # a call has begun, and has not ended
        self._index = index
        self._names = names
        self._is_single = is_single
        self._begun = 0
        self._header: tuple[str, str] | None = None  # id and name, until the first piece of arguments
        self._untaken: list[str] = []
        self._events: list[TokenText | ToolCallDelta] = []

    def begin(self, name: str, own_id: str | None = None) -> None:
        """Begin a call. Raises ValueError for an unknown function in a format without tags."""
        if self.is_done:
            return
        if self._names is not None and name not in self._names:
            raise ValueError(f"there is no function {name!r}")
        self._header = (sendable(own_id) if own_id else f"call_{secrets.token_hex(12)}", sendable(name))
        self._begun += 1
        self.is_open = True

    def write(self, arguments: str) -> None:
        """Take a piece of the arguments."""
        if not self.is_done:
            self._untaken.append(arguments)
        self.drop()

    def end(self) -> None:
        """End the call."""
        self._flush()
        self.completed += not self.is_done
        self.is_open = False
        self.is_done = self._is_single
        self.drop()

    def drop(self) -> None:
        """Take the text up to here for no content."""
        self.dropped = self.position

    def back(self, length: int) -> None:
        """Read the last `length` characters once more."""
        self.position -= length

    def take_events(self) -> list[TokenText | ToolCallDelta]:
        """The pieces of calls that came since this was last asked for."""
        self._flush()
        events, self._events = self._events, []
        return events

    def _flush(self) -> None:
        if not self._untaken:
            return
        call_id, name = self._header or (None, None)
        self._events.append(ToolCallDelta(self._begun - 1, "".join(self._untaken), call_id, name, self._index))
        self._untaken.clear()
        self._header = None


def make_tool_parser(tool_format: ToolFormat, request: GenerationRequest, index: int = 0) -> ToolCallParser | None:
    """The parser of the calls of one choice; None for a request without tools, or whose tools may not be called."""
    choice = request.tool_choice
    if not isinstance(request.prompt, ChatPrompt) or not request.prompt.tools or choice.mode == "none":
        return None
    called = tool_format if choice.mode == "auto" else FORCED
    return ToolCallParser(called, request.prompt.tools, parallel=choice.parallel, index=index)
