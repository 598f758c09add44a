"""Thinking parser: a model's text -> reasoning and answer.

Rule 1: the marks count before the first text of the answer, behind white space at most; then everything is content, so
        that an answer may mention them. There are two exceptions: one more closing mark is dropped where the reasoning
        may have been closed for the model, since the model often writes its own; and marks that are control tokens
        count anywhere.
Rule 2: no mark is emitted, nor the white space behind it and before the end of the reasoning. All other text is,
        unchanged.
Rule 3: a call inside the reasoning is held back up to the closing mark, which makes it reasoning, or up to the end of
        the output, which makes it and the text behind it content.
Rule 4: any cut of the same text gives the same channels. Only what may be part of a mark, the white space beside one,
        and what Rule 3 names is held back.
"""

from __future__ import annotations

from enum import Enum

from mlxserver.engine.events import Channel
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.reasoning_formats import ReasoningFormat
from mlxserver.engine.output.splitter import Piece
from mlxserver.engine.output.stop_strings import overlap


class ParserState(Enum):
    """Where the output is."""

    BEFORE = "before the first text, or the first behind the reasoning"
    REASONING = "inside the reasoning"
    CALL = "behind the beginning of a call inside the reasoning"
    CONTENT = "inside the answer"


class ThinkingParser:
    """Parser of one choice.

    starts_inside: the prompt has opened the reasoning, so that only its end will come; an opening mark that the model
    repeats is dropped. may_close_twice: the reasoning has a budget, so that it may be closed for the model.
    call_starts: texts that begin a call, none of which ends the reasoning if it is empty. call_end: text that ends one.
    """

    def __init__(
        self,
        marks: ReasoningFormat,
        starts_inside: bool,
        *,
        may_close_twice: bool = False,
        call_starts: tuple[str, ...] = (),
        call_end: str = "",
    ) -> None:
        self._marks = marks
        self._untagged = ParserState.REASONING if starts_inside else ParserState.CONTENT
        self._state = ParserState.BEFORE
        self._trims_left = False
        self._may_close_again = may_close_twice
        self._call_starts = call_starts
        self._call_end = call_end
        self._held = TokenText()
        self._scanned = 0  # how much of a call that is held contains no closing mark
        self._is_flushed = False
        self._pieces: list[Piece] = []
        self._readers = {
            ParserState.BEFORE: self._read_beginning,
            ParserState.REASONING: self._read_reasoning,
            ParserState.CALL: self._read_call,
            ParserState.CONTENT: self._read_content,
        }

    @property
    def is_thinking(self) -> bool:
        """Whether the output is inside the reasoning after the text fed last."""
        state = self._untagged if self._state is ParserState.BEFORE else self._state
        return state is not ParserState.CONTENT

    @property
    def is_closing(self) -> bool:
        """Whether the text fed last ends in what may be the beginning of the closing mark."""
        return self.is_thinking and overlap(self._held.text, self._marks.end) > 0

    @property
    def is_calling(self) -> bool:
        """Whether the reasoning ends in a call, complete or not."""
        if self._state is not ParserState.CALL:
            return False
        _, end, text = self._held.text.rpartition(self._call_end) if self._call_end else ("", "", "")
        behind = text.strip()
        return not end or any(start.startswith(behind) or behind.startswith(start) for start in self._call_starts)

    @property
    def holds_call(self) -> bool:
        """Whether text of the reasoning is held back that may be a call."""
        if self._state is ParserState.REASONING:
            return _overlap(self._held.text, self._call_starts) > 0
        return self._state is ParserState.CALL

    @property
    def is_unclosed(self) -> bool:
        """Whether the output ended in its reasoning."""
        return self.is_thinking

    def feed(self, text: TokenText | str) -> list[Piece]:
        """Pieces that `text` decides, in order, each with its channel."""
        self._held += text
        while self._readers[self._state]():
            pass
        return self._take_pieces()

    def flush(self) -> list[Piece]:
        """The text that is held back, at the end of the output: a call, or no mark."""
        self._is_flushed = True
        while self._held and self._readers[self._state]():
            pass
        if self._state is ParserState.BEFORE:
            self._state = self._untagged
        self._emit(len(self._held), "reasoning" if self._state is ParserState.REASONING else "content")
        return self._take_pieces()

    def _read_beginning(self) -> bool:
        """Drop the marks and the white space before the first text."""
        text = self._held.text.lstrip()
        is_inside = self._untagged is ParserState.REASONING
        marks = (self._marks.start, self._marks.end, *(() if is_inside else self._marks.dropped))
        match _mark_at(text, marks, is_whole=self._is_flushed):
            case None:
                return False
            case "":
                self._trims_left |= is_inside
                self._state = self._untagged
            case mark:
                self._skip(len(self._held) - len(text) + len(mark))
                if mark == self._marks.start:
                    self._state = ParserState.REASONING
                elif mark == self._marks.end:
                    self._untagged = ParserState.CONTENT
        return True

    def _read_reasoning(self) -> bool:
        text = self._held.text
        found = _first(text, (self._marks.end, *self._call_starts))
        if found is None:
            held = _overlap(text, (self._marks.end, *self._call_starts))
            if not self._is_flushed:
                self._emit(len(text[: len(text) - held].rstrip()), "reasoning")
            return False
        start, mark = found
        length = len(text[:start].rstrip())
        self._emit(length, "reasoning")
        if mark == self._marks.end:
            self._close(start - length + len(mark))
        else:
            self._state, self._scanned = ParserState.CALL, 0
        return True

    def _read_call(self) -> bool:
        text, end = self._held.text, self._marks.end
        start = text.find(end, self._scanned)
        if start < 0:
            self._scanned = max(len(text) - len(end) + 1, 0)
            return False
        length = len(text[:start].rstrip())
        self._emit(length, "reasoning")
        self._close(start - length + len(end))
        return True

    def _read_content(self) -> bool:
        """Emit content up to the next mark, if any counts here."""
        text, marks = self._held.text, self._content_marks()
        if not marks and not self._marks.closing:
            self._emit(len(text), "content")
            return False
        start, _ = _first(text, marks) or (len(text), "")
        if start < len(text) and (mark := _mark_at(text[start:], marks, is_whole=self._is_flushed)):
            self._emit(start, "content")
            self._skip(len(mark))
            self._may_close_again = False
            if mark == self._marks.start:
                self._state = ParserState.REASONING
            return True
        if not self._is_flushed:
            held = max(len(text) - start, _overlap(text, marks), self._closing_length(text))
            self._emit(len(text) - held, "content")
        elif self._marks.closing and text.rstrip().endswith(self._marks.closing):
            self._emit(len(text.rstrip()) - len(self._marks.closing), "content")
            self._skip(len(self._held))
        return False

    def _content_marks(self) -> tuple[str, ...]:
        marks = self._marks
        if marks.has_control_marks:
            return (marks.start, marks.end, *marks.dropped)
        return (marks.end,) if self._may_close_again else ()

    def _closing_length(self, text: str) -> int:
        """Length of the end of `text` that is dropped if nothing follows it."""
        closing, bare = self._marks.closing, text.rstrip()
        if closing and bare.endswith(closing):
            return len(text) - len(bare) + len(closing)
        return overlap(text, closing) if closing else 0

    def _close(self, dropped: int) -> None:
        """Go on behind the reasoning; dropped: characters of the mark and of the white space before it."""
        self._skip(dropped)
        self._state, self._untagged = ParserState.BEFORE, ParserState.CONTENT

    def _skip(self, length: int) -> None:
        self._held = self._held.drop(length)
        self._trims_left = True

    def _emit(self, length: int, channel: Channel) -> None:
        """Emit the first `length` characters that are held, less the white space beside a mark."""
        text, self._held = self._held.cut(length)
        if self._trims_left:
            text = text.drop(length - len(text.text.lstrip()))
            self._trims_left = not text
        if text:
            self._pieces.append((channel, text))

    def _take_pieces(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


def _overlap(text: str, wanted: tuple[str, ...]) -> int:
    return max((overlap(text, one) for one in wanted), default=0)


def _first(text: str, marks: tuple[str, ...]) -> tuple[int, str] | None:
    """Start and text of the first mark in a text, of two that begin together the longer one."""
    found = [(start, -len(mark), mark) for mark in marks if (start := text.find(mark)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def _mark_at(text: str, marks: tuple[str, ...], *, is_whole: bool) -> str | None:
    """The longest mark with which a text begins; "" if with none, None if that is not decided."""
    if not is_whole and any(mark != text and mark.startswith(text) for mark in marks):
        return None
    return max((mark for mark in marks if text.startswith(mark)), key=len, default="")
