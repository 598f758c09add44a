"""Pairs of a query and a document in tokens, as a reranker reads them.

Rule: a pair has its document whole, unless it is to be cut; the query is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

# As Qwen3-Reranker was trained (huggingface.co/Qwen/Qwen3-Reranker-0.6B), in the form of its chat template.
INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
_QUESTION = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
    "<Instruct>: {instruction}\n\n<Query>: {query}\n\n<Document>: "
)
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class Pair(NamedTuple):
    """Tokens of a pair. second: the first token of the second text, where the model tells the two apart, or else 0."""

    tokens: tuple[int, ...]
    second: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """How documents are cut. document: most tokens of one. pair: most tokens of a pair. None: not at all."""

    document: int | None = None
    pair: int | None = None

    def tokens(self, others: int) -> int | None:
        """Tokens of a document that stay beside so many others of its pair."""
        room = None if self.pair is None else max(0, self.pair - others)
        return min((each for each in (self.document, room) if each is not None), default=None)


class Pairs(Protocol):
    """The tokens of a reranker's pairs. takes_instruction: it reads what makes a document relevant."""

    takes_instruction: bool

    def tokenize(self, query: str, documents: Sequence[str], instruction: str | None, cut: Cut) -> list[Pair]:
        """A pair per document. Only documents are cut, as far as that goes."""


class EncoderPairs:
    """Pairs of a cross-encoder: both texts, with the special tokens that its tokenizer sets around them.

    has_types: the model tells the two texts apart.
    """

    takes_instruction = False

    def __init__(self, tokenizer: Any, *, has_types: bool) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._has_types = has_types

    def tokenize(self, query: str, documents: Sequence[str], instruction: str | None, cut: Cut) -> list[Pair]:
        """A pair per document. The query is tokenized once."""
        core = self._tokenizer
        asked = core.encode(query, add_special_tokens=False)
        most = cut.tokens(len(asked.ids) + core.num_special_tokens_to_add(True))
        found = []
        for document in core.encode_batch(list(documents), add_special_tokens=False):
            if most is not None:
                document.truncate(most)
            pair = core.post_process(asked, document, True)
            second = pair.type_ids.index(1) if self._has_types and 1 in pair.type_ids else 0
            found.append(Pair(tuple(pair.ids), second))
        return found


class JudgePairs:
    """Pairs of a judge: a question in the form of its chat template, and the beginning of its answer."""

    takes_instruction = True

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._answer = tuple(self._ids(_ANSWER))

    def tokenize(self, query: str, documents: Sequence[str], instruction: str | None, cut: Cut) -> list[Pair]:
        """A pair per document."""
        # A document is tokenized with what stands before it, since the space there may be part of its first token.
        question = _QUESTION.format(instruction=instruction or INSTRUCTION, query=query)
        asked = len(self._ids(question))
        most = cut.tokens(asked + len(self._answer))
        texts = [question + document for document in documents]
        found = []
        for encoded in self._tokenizer.encode_batch(texts, add_special_tokens=False):
            ids = encoded.ids if most is None else encoded.ids[: asked + most]
            found.append(Pair((*ids, *self._answer)))
        return found

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
