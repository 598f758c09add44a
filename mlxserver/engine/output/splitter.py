"""Splitter: the seam between an output stream and what tells a model's reasoning, answer and calls apart."""

from __future__ import annotations

from typing import Protocol

from mlxserver.engine.events import Channel, ToolCallDelta
from mlxserver.engine.output.marked_text import TokenText

Piece = tuple[Channel, TokenText] | ToolCallDelta


class Splitter(Protocol):
    """Parser of one choice that splits its text by channel."""

    @property
    def is_thinking(self) -> bool:
        """Whether the output is inside the reasoning after the text fed last."""

    @property
    def is_closing(self) -> bool:
        """Whether the text fed last ends in what may be the beginning of the closing mark."""

    @property
    def is_calling(self) -> bool:
        """Whether the reasoning ends in a call, complete or not."""

    @property
    def holds_call(self) -> bool:
        """Whether text of the reasoning is held back that may be a call."""

    @property
    def is_unclosed(self) -> bool:
        """Whether the output ended in its reasoning."""

    def feed(self, text: TokenText | str) -> list[Piece]:
        """Pieces that `text` decides, in order."""

    def flush(self) -> list[Piece]:
        """Pieces of the text that is held back, at the end of the output."""
