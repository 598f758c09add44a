"""Marked text: text with the tokens that it came from, as the stages of an output stream pass it on.

Rule 1: a token goes with the first of its text that is emitted, and with no other.
Rule 2: a token of which no text is emitted is dropped with its text.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxserver.engine.events import TokenLogprob


@dataclass(frozen=True, slots=True)
class TokenText:
    """Text. marks: offsets at which the text of each token begins, in order; only of tokens with log-probabilities."""

    text: str = ""
    marks: tuple[tuple[int, TokenLogprob], ...] = ()

    def __len__(self) -> int:
        return len(self.text)

    def __add__(self, other: TokenText | str) -> TokenText:
        if isinstance(other, str):
            return TokenText(self.text + other, self.marks)
        if not self.text:
            return other
        moved = tuple((at + len(self), token) for at, token in other.marks)
        return TokenText(self.text + other.text, self.marks + moved)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of its tokens."""
        return tuple(token for _, token in self.marks)

    def cut(self, length: int) -> tuple[TokenText, TokenText]:
        """The first `length` characters, to be emitted, and the rest. A token that is cut goes with the first part."""
        if length >= len(self.text):
            return self, NOTHING
        head = tuple(mark for mark in self.marks if mark[0] < length)
        tail = tuple((at - length, token) for at, token in self.marks[len(head) :])
        return TokenText(self.text[:length], head), TokenText(self.text[length:], tail)

    def drop(self, length: int) -> TokenText:
        """The text without its first `length` characters. A token that is cut stays with the rest."""
        last = max((at for at, _ in self.marks if at < length), default=0)
        end = next((at for at, _ in self.marks if at > last), len(self))
        first_kept = last if end > length else length
        kept = tuple((max(at - length, 0), token) for at, token in self.marks if at >= first_kept)
        return TokenText(self.text[length:], kept)


NOTHING = TokenText()
