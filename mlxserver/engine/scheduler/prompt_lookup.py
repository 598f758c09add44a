"""Prompt lookup: the next tokens of a sequence are predicted from its own: what followed the same n-gram before.

Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, "Inference with Reference" (arXiv:2304.04487). It costs no
forward pass, and is right where an answer quotes or rewrites its prompt, or repeats itself.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import abc

import numpy as np

_N = 3  # tokens of an n-gram
_BITS = 21  # of a token id: three are one 63-bit number
_NEARBY = 64  # tokens behind the place where a long quotation broke off, in which it may go on
_LONG = 8  # tokens of a long quotation


class PromptLookup:
    """Predicts the tokens of one sequence.

    streak: how many of the last tokens also stand before the predicted one where it was seen; 0 without a prediction.
    tokens: of the prompt, and what was generated before a preemption.
    """

    def __init__(self, tokens: abc.Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._grams, self._behind = _index(tokens)
        self._later: dict[int, int] = {}  # position behind each n-gram that ends in a generated token
        self._at: int | None = None  # of the predicted token
        self._broken: int | None = None  # where the last long quotation broke off
        self.streak = 0
        self._find()

    def __len__(self) -> int:
        """Tokens that it knows."""
        return len(self._tokens)

    def append(self, token: int) -> bool | None:
        """Add a token. Returns whether it was predicted, None if none was."""
        is_hit = None if self._at is None else self._tokens[self._at] == token
        if len(self._tokens) >= _N:
            self._later[self._gram()] = len(self._tokens)
        self._tokens.append(token)
        if is_hit and self._at is not None:
            self._at, self.streak = self._at + 1, self.streak + 1
        else:
            if self.streak >= _LONG:
                self._broken = self._at
            self._find()
        return is_hit

    def draft(self, most: int) -> list[int]:
        """The next tokens as predicted, `most` of them; none without a prediction."""
        if self._at is None or most < 1:
            return []
        drafted = self._tokens[self._at : self._at + most]
        period = len(self._tokens) - self._at  # what repeats itself goes on like that
        while len(drafted) < most:
            drafted.append(drafted[-period])
        return drafted

    def _find(self) -> None:
        """Set where the next token was seen."""
        self._at = self._nearby() or self._latest() if len(self._tokens) >= _N else None
        self.streak = _N if self._at is not None else 0

    def _nearby(self) -> int | None:
        """The position behind the n-gram not far from where a long quotation broke off."""
        if self._broken is None:
            return None
        tokens, gram = self._tokens, self._tokens[-_N:]
        end = min(self._broken + _NEARBY, len(tokens) - _N)
        starts = (start for start in range(self._broken, end) if tokens[start] == gram[0])  # first, as few are
        return next((start + _N for start in starts if tokens[start : start + _N] == gram), None)

    def _latest(self) -> int | None:
        """The position behind the n-gram where it was seen the last time."""
        gram = self._gram()
        if found := self._later.get(gram):
            return found
        at = bisect_right(self._grams, gram) - 1
        return self._behind[at] if at >= 0 and self._grams[at] == gram else None

    def _gram(self) -> int:
        first, second, third = self._tokens[-_N:]
        return first << 2 * _BITS | second << _BITS | third


def _index(tokens: abc.Sequence[int]) -> tuple[array[int], array[int]]:
    """The n-grams of tokens in order, and the position behind each; of those that are equal, the last one is last."""
    ids = np.array(tokens, dtype=np.int64)
    grams = ids[:-_N] << 2 * _BITS | ids[1 : -_N + 1] << _BITS | ids[2 : -_N + 2]
    order = np.argsort(grams, kind="stable")
    return array("q", grams[order].tobytes()), array("q", (order.astype(np.int64) + _N).tobytes())
