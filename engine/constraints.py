"""What a row may say next: grammars through llguidance, and limits on when it may end or think.

Rule 1: a constraint sees every token of its row, in order, and answers with a bit mask over the vocabulary.
Rule 2: with a thinking model a grammar holds from the first token after the thinking.
Rule 3: a grammar that is refused is PromptRejected with llguidance's own reason.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from engine.errors import PromptRejected
from engine.thinking import ThinkingParser
from engine.types import Constraint

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class Grammars:
    """Makes the grammars of one model. llguidance reads the tokenizer at the first use, once."""

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
        self._wrapper = tokenizer
        self._vocab_size = vocab_size

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        fast = self._wrapper._tokenizer  # what mlx-lm wraps, which llguidance asks for
        return from_tokenizer(fast, n_vocab=self._vocab_size, eos_token=sorted(self._wrapper.eos_token_ids))

    def json(self, schema: Mapping[str, Any] | None, param: str) -> GrammarConstraint:
        """JSON of this schema; any object for None. Raises PromptRejected."""
        text = json.dumps({"type": "object"} if schema is None else dict(schema))
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
        except ValueError as error:
            raise PromptRejected(f"The JSON schema can't be used: {error}", param) from None
        if reason := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise PromptRejected(f"The JSON schema can't be used: {reason}", param)
        return GrammarConstraint(LLMatcher(self._tokenizer, grammar))


class GrammarConstraint:
    """A grammar, from its beginning. Once it is complete, only an end of sequence is allowed."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> bytes:
        """What goes on the grammar, or ends the answer."""
        mask: bytes = self._matcher.compute_bitmask()
        return mask

    def accept(self, token: int) -> None:
        """Advance."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Restricted:
    """Every token but some, for the first tokens of an answer."""

    def __init__(self, forbidden: Collection[int], tokens: int, vocab_size: int) -> None:
        mask = np.full((vocab_size + 7) // 8, 255, dtype=np.uint8)
        for token in forbidden:
            mask[token // 8] &= ~np.uint8(1 << token % 8)
        self._mask = mask.tobytes()
        self._left = tokens

    def allowed(self) -> bytes | None:
        """All but the forbidden ones while the restriction lasts."""
        return self._mask if self._left > 0 else None

    def accept(self, token: int) -> None:
        """One token less."""
        self._left -= 1


class Phase(Enum):
    """Where a thinking model is in its answer."""

    UNDECIDED = "nothing said yet"
    THINKING = "inside the tags"
    ANSWERING = "behind them"


class ThinkingControl:
    """Follows a row's reasoning: closes it when its budget is spent, and holds a grammar back until it is over.

    start, end: the token ids of the tags. decode: token id -> text, of this row alone. budget: most tokens of
    reasoning; None sets no limit. inner: what holds for the answer. vocab_size in tokens.
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
        self._thought = 0
        self._forced: list[int] = []  # the rest of a tag, token by token
        self._phase = Phase.UNDECIDED
        if parser.is_thinking:
            self._think()

    def allowed(self) -> bytes | None:
        """The rest of a tag; anything while thinking; what `inner` allows afterwards, or the beginning of a tag."""
        if self._forced:
            return _with(bytes((self._vocab_size + 7) // 8), self._forced[0])
        if self._phase is Phase.THINKING or self._inner is None:
            return None
        mask = self._inner.allowed()
        return _with(mask, self._start[0]) if mask and self._phase is Phase.UNDECIDED else mask

    def accept(self, token: int) -> None:
        """Follow the row."""
        was_forced = bool(self._forced)
        self._forced = self._forced[1:]
        if self._phase is Phase.ANSWERING:
            if self._inner:
                self._inner.accept(token)
            return
        self._parser.feed(self._decode(token))
        if self._parser.is_thinking:
            self._thought += self._phase is Phase.THINKING
            if not self._forced:
                self._think()
        elif self._phase is Phase.THINKING:
            self._phase = Phase.ANSWERING
        elif self._inner and not was_forced:
            self._begin(self._inner, token)

    def _think(self) -> None:
        self._phase = Phase.THINKING
        if self._budget is not None and self._thought >= self._budget:
            self._forced = list(self._end)

    def _begin(self, inner: Constraint, token: int) -> None:
        """The first token: the beginning of a tag, or of the answer."""
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
        """What all of them allow."""
        masks = [mask for part in self._parts if (mask := part.allowed())]
        if not masks:
            return None
        words = [np.frombuffer(mask, dtype=np.uint8) for mask in masks]
        length = min(map(len, words))
        together = np.bitwise_and.reduce([word[:length] for word in words])
        # Nothing is left where a grammar is complete before the answer may end: then the last one, the grammar, wins.
        return together.tobytes() if together.any() else masks[-1]

    def accept(self, token: int) -> None:
        """Tell all of them."""
        for part in self._parts:
            part.accept(token)


def _with(mask: bytes, token: int) -> bytes:
    changed = bytearray(mask)
    changed[token // 8] |= 1 << token % 8
    return bytes(changed)
