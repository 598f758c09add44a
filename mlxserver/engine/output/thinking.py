"""Thinking parser: a model's text -> reasoning and answer.

Rule 1: an opening tag counts only at the very start of the output, behind white space at most; after the closing tag
        everything is content, so that an answer may mention tags. Only where the reasoning may have been closed for
        the model, one more closing tag is dropped: the model often writes its own.
Rule 2: no tag is emitted, nor the white space after the opening one and on both sides of the closing one. All other
        text is, unchanged.
Rule 3: any cut of the same text gives the same channels. Only what may be part of a tag, or the white space beside
        one, is held back.
"""

from __future__ import annotations

from mlxserver.engine.events import Channel
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.stop_strings import overlap


class ThinkingParser:
    """Parser of one choice.

    starts_inside: the prompt has opened the reasoning, so that only its end will come; an opening tag that the model
    repeats is dropped. may_close_twice: the reasoning has a budget, so that it may be closed for the model.
    """

    def __init__(self, start_tag: str, end_tag: str, starts_inside: bool, *, may_close_twice: bool = False) -> None:
        self._start_tag = start_tag
        self._end_tag = end_tag
        self._untagged: Channel = "reasoning" if starts_inside else "content"
        self._channel: Channel | None = None
        self._trims_left = False
        self._may_close_again = may_close_twice
        self._held = TokenText()

    @property
    def is_thinking(self) -> bool:
        """Whether the output is inside the reasoning after the text fed last."""
        return (self._channel or self._untagged) == "reasoning"

    @property
    def is_closing(self) -> bool:
        """Whether the text fed last ends in what may be the beginning of the closing tag."""
        return self.is_thinking and overlap(self._held.text, self._end_tag) > 0

    def feed(self, text: TokenText | str) -> list[tuple[Channel, TokenText]]:
        """Pieces that `text` decides, in order, each with its channel."""
        self._held += text
        pieces = []
        if self._channel is None:
            self._find_start()
        if self._channel == "reasoning":
            pieces += self._read_reasoning()
        if self._channel == "content":
            pieces += self._read_content()
        return pieces

    def flush(self) -> list[tuple[Channel, TokenText]]:
        """The text that is held back, at the end of the output: it was no tag."""
        self._channel = self._channel or self._untagged
        return self._emit(len(self._held))

    def _find_start(self) -> None:
        text = self._held.text.lstrip()
        if text.startswith(self._start_tag):
            self._enter("reasoning", len(self._held) - len(text) + len(self._start_tag))
        elif not self._start_tag.startswith(text):
            self._enter(self._untagged, 0)
            self._trims_left = self.is_thinking

    def _read_reasoning(self) -> list[tuple[Channel, TokenText]]:
        reasoning, tag, _ = self._held.text.partition(self._end_tag)
        if not tag:
            return self._emit(len(reasoning[: len(reasoning) - overlap(reasoning, self._end_tag)].rstrip()))
        length = len(reasoning.rstrip())
        pieces = self._emit(length)
        self._enter("content", len(reasoning) - length + len(tag))
        return pieces

    def _read_content(self) -> list[tuple[Channel, TokenText]]:
        if not self._may_close_again:
            return self._emit(len(self._held))
        content, tag, _ = self._held.text.partition(self._end_tag)
        if not tag:
            return self._emit(len(content) - overlap(content, self._end_tag))
        pieces = self._emit(len(content))
        self._may_close_again = False
        self._enter("content", len(tag))
        return pieces + self._emit(len(self._held))

    def _enter(self, channel: Channel, dropped: int) -> None:
        """Change channels, and drop the characters of a tag and of the white space before it."""
        self._channel = channel
        self._held = self._held.drop(dropped)
        self._trims_left = True

    def _emit(self, length: int) -> list[tuple[Channel, TokenText]]:
        """The first `length` characters that are held, less the white space beside a tag."""
        text, self._held = self._held.cut(length)
        if self._trims_left:
            text = text.drop(length - len(text.text.lstrip()))
            self._trims_left = not text
        return [(self._channel or self._untagged, text)] if text else []
