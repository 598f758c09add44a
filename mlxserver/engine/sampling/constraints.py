"""Constraints on the next token: minimum length, thinking budget, and several constraints at once.

Rule 1: a constraint gets every token of its sequence, in order, and answers with a bit mask over the vocabulary.
Rule 2: with a thinking model a grammar (sampling/grammars.py) holds from the first token of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from mlxserver.engine.output.splitter import Splitter
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


MAX_CALL_TOKENS = 4096  # of a call that has begun when the thinking budget is spent


class Phase(Enum):
    """Part of a thinking model's answer."""

    BEFORE = "before the reasoning, or between it and the answer"
    THINKING = "inside the reasoning"
    ANSWERING = "behind it"


@dataclass(frozen=True, slots=True)
class Path:
    """Token ids that must come next."""

    tokens: tuple[int, ...] = ()

    def behind(self, token: int) -> Path | None:
        """What is left of it behind a token; None if the token is not its first."""
        return Path(self.tokens[1:]) if self.tokens[:1] == (token,) else None

    def unopened(self, opened: Sequence[int]) -> Path:
        """What is left of it where its beginning stands at the end of the prompt."""
        lengths = range(min(len(self.tokens), len(opened)), 0, -1)
        ends = (length for length in lengths if self.tokens[:length] == tuple(opened[len(opened) - length :]))
        return Path(self.tokens[next(ends, 0) :])


class ThinkingControl:
    """Follows the reasoning of a sequence: closes it when its budget is spent, and holds a grammar back until its end.

    start, end: token ids of the marks. decode: token id -> text, of this sequence alone. answers: token ids of the
    texts by which an answer begins behind the reasoning, and which `inner` follows; an empty one where it may follow
    at once. opened: token ids at the end of the prompt, which may have begun one of these texts. budget: most tokens of
    reasoning; None sets no limit. A call that has begun is completed. inner: the constraint of the answer.
    """

    def __init__(
        self,
        parser: Splitter,
        decode: Callable[[int], str],
        *,
        start: Sequence[int],
        end: Sequence[int],
        vocab_size: int,
        answers: Sequence[Sequence[int]] = ((),),
        opened: Sequence[int] = (),
        budget: int | None = None,
        inner: Constraint | None = None,
    ) -> None:
        self._parser = parser
        self._decode = decode
        self._end = Path(tuple(end))
        self._answers = [Path(tuple(answer)) for answer in answers]
        self._vocab_size = vocab_size
        self._budget = budget
        self._inner = inner
        self._num_thinking = 0
        self._paths: list[Path] = []  # of which one must be taken; with none, anything may come
        self._phase = Phase.BEFORE
        if parser.is_thinking:
            self._think()
        elif inner:
            self._paths = [Path(tuple(start)), *(answer.unopened(opened) for answer in self._answers)]

    def allowed(self) -> bytes | None:
        """The next token of a mark; anything while thinking; afterwards what `inner` allows."""
        if self._phase is Phase.ANSWERING or Path() in self._paths:
            mask = self._inner.allowed() if self._inner else None
        else:
            mask = bytes(mask_bytes(self._vocab_size)) if self._paths else None
        return _with(mask, {path.tokens[0] for path in self._paths if path.tokens}) if mask else None

    def accept(self, token: int) -> None:
        """Advance by a token."""
        if self._inner and self._phase is Phase.ANSWERING:
            self._inner.accept(token)
            return
        text = self._decode(token)
        self._parser.feed(text)
        if self._paths:
            self._follow(token, is_blank=text.isspace())
        elif self._parser.is_thinking:
            self._num_thinking += self._phase is Phase.THINKING
            self._think()
        elif self._phase is Phase.THINKING:
            self._close(self._answers if self._inner else [Path()])

    def _think(self) -> None:
        self._phase = Phase.THINKING
        if self._budget is None or self._num_thinking < self._budget or self._parser.is_closing:
            return
        if not self._parser.is_calling or self._num_thinking >= self._budget + MAX_CALL_TOKENS:
            self._paths = [self._end]

    def _follow(self, token: int, *, is_blank: bool) -> None:
        """Advance on the paths: of a mark, or of the beginning of an answer. White space may come before a mark."""
        begun = [path for path in (path.behind(token) for path in self._paths) if path]
        if self._inner and not begun:
            self._inner.accept(token)
            if not (is_blank and Path() in self._paths):
                self._phase, self._paths = Phase.ANSWERING, []
            return
        self._paths = [] if Path() in begun else begun
        if self._parser.is_thinking and not self._paths:
            self._think()
        elif not self._paths:
            self._close(self._answers if self._phase is Phase.THINKING else [Path()])

    def _close(self, answers: list[Path]) -> None:
        """Go on behind the reasoning, with one of these beginnings of an answer."""
        is_open = not any(path.tokens for path in answers)
        self._phase = Phase.ANSWERING if is_open else Phase.BEFORE
        self._paths = [] if is_open else answers


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


def _with(mask: bytes, tokens: Collection[int]) -> bytes:
    changed = bytearray(mask)
    for token in tokens:
        changed[token // 8] |= 1 << token % 8
    return bytes(changed)
