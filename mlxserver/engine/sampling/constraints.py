"""Constraints on the next token: minimum length, thinking budget, and several constraints at once.

Rule 1: a constraint gets every token of its sequence, in order, and answers with a bit mask over the vocabulary.
Rule 2: with a thinking model a grammar (sampling/grammars.py) holds from the first token after the reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import Enum

import numpy as np

from mlxserver.engine.output.thinking import ThinkingParser
from mlxserver.engine.sequence import Constraint


def mask_bytes(vocab_size: int) -> int:
    """Length of every mask over a vocabulary, in bytes: llguidance's, whole words of 32 bits."""
    return (vocab_size + 31) // 32 * 4


class Restricted:
    """Excludes some tokens for the first `tokens` tokens of an answer."""

    def __init__(self, forbidden: Collection[int], tokens: int, vocab_size: int) -> None:
        mask = np.full(mask_bytes(vocab_size), 255, dtype=np.uint8)
        for token in forbidden:
            mask[token // 8] &= ~np.uint8(1 << token % 8)
        self._mask = mask.tobytes()
        self._left = tokens

    def allowed(self) -> bytes | None:
        """All but the forbidden tokens while the restriction lasts."""
        return self._mask if self._left > 0 else None

    def accept(self, token: int) -> None:
        """Count the token."""
        self._left -= 1


class Phase(Enum):
    """Part of a thinking model's answer."""

    UNDECIDED = "no token yet"
    THINKING = "inside the tags"
    ANSWERING = "behind the tags"


class ThinkingControl:
    """Follows the reasoning of a sequence: closes it when its budget is spent, and holds a grammar back until its end.

    start, end: token ids of the tags. decode: token id -> text, of this sequence alone. budget: most tokens of
    reasoning; None sets no limit. inner: the constraint of the answer.
    """

    def __init__(
        self,
        parser: ThinkingParser,
        decode: Callable[[int], str],
        *,
        start: Sequence[int],
        end: Sequence[int],
        vocab_size: int,
        budget: int | None = None,
        inner: Constraint | None = None,
    ) -> None:
        self._parser = parser
        self._decode = decode
        self._start, self._end = tuple(start), tuple(end)
        self._vocab_size = vocab_size
        self._budget = budget
        self._inner = inner
        self._num_thinking = 0
        self._forced: list[int] = []  # the rest of a tag, token by token
        self._phase = Phase.UNDECIDED
        if parser.is_thinking:
            self._think()

    def allowed(self) -> bytes | None:
        """The rest of a tag; anything while thinking; what `inner` allows afterwards, or the beginning of a tag."""
        if self._forced:
            return _with(bytes(mask_bytes(self._vocab_size)), self._forced[0])
        if self._phase is Phase.THINKING or self._inner is None:
            return None
        mask = self._inner.allowed()
        return _with(mask, self._start[0]) if mask and self._phase is Phase.UNDECIDED else mask

    def accept(self, token: int) -> None:
        """Advance by a token."""
        was_forced = bool(self._forced)
        self._forced = self._forced[1:]
        if self._phase is Phase.ANSWERING:
            if self._inner and not was_forced:  # the rest of a tag is no part of the answer
                self._inner.accept(token)
            return
        self._parser.feed(self._decode(token))
        if self._parser.is_thinking:
            self._num_thinking += self._phase is Phase.THINKING
            if not self._forced:
                self._think()
        elif self._phase is Phase.THINKING:
            self._phase = Phase.ANSWERING
        elif self._inner and not was_forced:
            self._begin(self._inner, token)

    def _think(self) -> None:
        self._phase = Phase.THINKING
        if self._budget is not None and self._num_thinking >= self._budget and not self._parser.is_closing:
            self._forced = list(self._end)

    def _begin(self, inner: Constraint, token: int) -> None:
        """Take the first token: the beginning of a tag, or of the answer."""
        if token == self._start[0]:
            self._forced = list(self._start[1:])
        else:
            self._phase = Phase.ANSWERING
            inner.accept(token)


class Every:
    """Several constraints at once."""

    def __init__(self, parts: Sequence[Constraint]) -> None:
        self._parts = parts

    def allowed(self) -> bytes | None:
        """The tokens that all parts allow."""
        masks = [mask for part in self._parts if (mask := part.allowed())]
        if not masks:
            return None
        together = np.bitwise_and.reduce([np.frombuffer(mask, dtype=np.uint8) for mask in masks])
        # Nothing is left where a grammar is complete before the answer may end: then the last one, the grammar, wins.
        return together.tobytes() if together.any() else masks[-1]

    def accept(self, token: int) -> None:
        """Advance all parts."""
        for part in self._parts:
            part.accept(token)


def _with(mask: bytes, token: int) -> bytes:
    changed = bytearray(mask)
    changed[token // 8] |= 1 << token % 8
    return bytes(changed)
