"""Grammars through llguidance: compiled once per text, then copied for every sequence that they constrain.

Rule 1: compile() takes some tenths of a second for a large schema. It may run on any thread, and runs on the tokenizer
        worker (worker/tokenizer_worker.py) before the engine thread, which all streams share, needs the grammar.
Rule 2: the tokenizer is read by the first compilation, not by the load. That takes as long, some 30 MB, and Python's
        lock; most models never need it.
Rule 3: a grammar that can't be enforced raises PromptRejected with llguidance's own reason.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLTokenizer

from mlxserver.engine.errors import PromptRejected

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

CACHED_GRAMMARS = 16  # most recently used; a very large schema takes some 10 MB


@dataclass(frozen=True, slots=True)
class Grammar:
    """Text of a JSON schema, or of a grammar in llguidance's Lark. param: the request's field that it comes from."""

    text: str
    param: str
    is_lark: bool = False


def json_grammar(schema: Mapping[str, Any] | None, param: str) -> Grammar:
    """Grammar of JSON with this schema; of any object for None. Raises PromptRejected."""
    try:
        return Grammar(json.dumps({"type": "object"} if schema is None else dict(schema)), param)
    except RecursionError:
        raise PromptRejected("The JSON schema can't be used: it is nested too deeply.", param) from None


class Grammars:
    """Compiled grammars of one model."""

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
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

    def is_special(self, text: str) -> bool:
        """Whether a text is a control token, which no string of a grammar matches."""
        tokens = self._tokenizer().tokenize_str(text, parse_special=True) if self.is_usable else []
        return len(tokens) == 1 and self._tokenizer().is_special_token(tokens[0])

    def constraint(self, grammar: Grammar) -> GrammarConstraint:
        """Constraint of one sequence by a grammar. Raises PromptRejected."""
        return GrammarConstraint(self.compile(grammar).deep_copy(), grammar.param)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Matcher of a grammar at its beginning, shared: copy it to advance it. Raises PromptRejected."""
        try:
            return self._compiled(grammar.text, grammar.is_lark)
        except ValueError as error:
            raise PromptRejected(f"The JSON schema can't be used: {error}", grammar.param) from None

    def _compile(self, text: str, is_lark: bool) -> LLMatcher:
        """Raises ValueError."""
        tokenizer = self._tokenizer()
        if not is_lark:
            text = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
        matcher = LLMatcher(tokenizer, text)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def _tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it. Raises ValueError."""
        if self._fast is None:
            raise ValueError("this model's tokenizer has no Rust core, which grammars need")
        with self._lock:
            if self._llg_tokenizer is None:
                text = json.dumps(json.loads(self._fast.to_str()) | {"padding": None, "truncation": None})
                slices = LLTokenizer.json_slices()  # half the time of the general ones, at JSON
                self._llg_tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos, slices=slices)
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
