"""Grammars through llguidance: compiled once per text, then copied for every sequence that they constrain.

Rule 1: compile() takes some tenths of a second for a large schema. It may run on any thread, and runs on the tokenizer
        worker (worker/tokenizer_worker.py) before the engine thread, which all streams share, needs the grammar.
Rule 2: the tokenizer is read by the first compilation, not by the load. That takes as long, some 30 MB, and Python's
        lock; most models never need it.
Rule 3: a grammar that can't be enforced raises PromptRejected with the keyword's path and llguidance's own reason.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLTokenizer

from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.requests import Grammar
from mlxserver.engine.sampling.schema_faults import find_fault, rejected
from mlxserver.engine.sampling.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

CACHED_GRAMMARS = 16  # most recently used; a very large schema takes some 10 MB


class Grammars:
    """Compiled grammars of one model."""

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
        self._wrapped = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._eos = sorted(tokenizer.eos_token_ids)
        self._vocab_size = vocab_size
        self._llg_tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(CACHED_GRAMMARS)(self._compile)

    @property
    def is_usable(self) -> bool:
        """Whether llguidance can read the tokenizer, which takes one with a Rust core."""
        return self._fast is not None

    def split(self, text: str) -> list[int | str]:
        """The control tokens in a text, which no string of a grammar matches, and what is between them."""
        if not self.is_usable:
            return [text]
        # Not by llguidance's own parser, which knows only those between angle brackets.
        control = self._control_tokens()
        names = sorted(filter(None, control), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return [control.get(piece, piece) for piece in pieces if piece]

    def control_tokens(self) -> list[int]:
        """All control tokens but those that end a sequence."""
        return sorted(set(self._control_tokens().values()).difference(self._eos))

    def _control_tokens(self) -> dict[str, int]:
        """The ids of all control tokens, by their texts."""
        if self._fast is None:
            return {}
        is_special = self._tokenizer().is_special_token
        added = self._fast.get_added_tokens_decoder().items()
        return {entry.content: token for token, entry in added if token < self._vocab_size and is_special(token)}

    def constraint(self, grammar: Grammar, begun: Sequence[int] = ()) -> GrammarConstraint:
        """Constraint of one sequence by a grammar, of which it may have begun. Raises PromptRejected.

        begun: tokens at the end of the prompt. They count if the grammar allows them.
        """
        matcher = self.compile(grammar).deep_copy()
        if matcher.validate_tokens(list(begun)) == len(begun):
            matcher.consume_tokens(list(begun))
        return GrammarConstraint(matcher, grammar.param)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Matcher of a grammar at its beginning, shared: copy it to advance it. Raises PromptRejected."""
        try:
            return self._compiled(grammar.text, grammar.is_lark)
        except ValueError as error:
            raise self._rejection(grammar, error) from None

    def _rejection(self, grammar: Grammar, error: ValueError) -> PromptRejected:
        for document in grammar.documents:
            if fault := find_fault(document, self._reason):
                return rejected(document, fault)
        return PromptRejected(f"The JSON schema can't be used: {error}", grammar.param)

    def _reason(self, schema: str) -> str | None:
        """Why a schema can't be compiled; None if it can."""
        try:
            self._compile(schema, is_lark=False)
        except ValueError as error:
            return str(error)
        return None

    def _compile(self, text: str, is_lark: bool) -> LLMatcher:
        """Raises ValueError."""
        tokenizer = self._tokenizer()
        matcher = LLMatcher(tokenizer, text if is_lark else LLMatcher.grammar_from_json_schema(text))
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        beginning = matcher.deep_copy()
        beginning.compute_bitmask()
        if beginning.is_error():  # schemas that are made of each other alone
            raise ValueError("no value fits it")
        return matcher

    def _tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it. Raises ValueError."""
        with self._lock:
            if self._llg_tokenizer is None:
                self._llg_tokenizer = read_vocabulary(self._wrapped, self._vocab_size)
            return self._llg_tokenizer


class GrammarConstraint:
    """Constraint by a grammar. Once the grammar is complete, only an end of sequence is allowed."""

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher = matcher
        self._param = param

    def allowed(self) -> bytes:
        """The tokens that continue the grammar, or end the answer.

        Raises PromptRejected where llguidance gives up: a grammar can grow beyond its limits in mid-answer.
        """
        mask: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise PromptRejected(f"The JSON schema can't be used: {self._matcher.get_error()}", self._param)
        return mask

    def accept(self, token: int) -> None:
        """Advance by a token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
