"""Runner of rerankers: each document becomes a sequence with the query, and its score an event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import InputTooLong, PromptRejected, WrongKind
from mlxserver.engine.events import Event, Finish, Relevance
from mlxserver.engine.loading.reranker_model import RerankerFacts, RerankerModel
from mlxserver.engine.prompt.pairs import Cut, EncoderPairs, JudgePairs, Pairs
from mlxserver.engine.requests import EngineRequest, ModelFacts, Question, RerankRequest
from mlxserver.engine.runners.embedding import UNSAMPLED, answer
from mlxserver.engine.sequence import SampledToken, Sequence
from mlxserver.engine.worker.batch import Batch


class RerankRunner:
    """A loaded reranker. `preprocess` and `answer` hold nothing of the batch."""

    def __init__(self, spec: ModelSpec, model: RerankerModel, batch: Batch) -> None:
        self.batch = batch
        self.idle_steps: Iterator[object] = iter(())
        facts = model.facts
        self.facts = ModelFacts(None, facts.context_length, facts.weight_bytes, frozenset({"rerank"}), kind="rerank")
        documents = _Documents(spec.key, model.tokenizer, facts)
        self.preprocess = documents.preprocess
        self.answer = documents.answer

    def prepare(self, request: EngineRequest, ids: Iterator[int]) -> list[tuple[Sequence, ScoreOutput]]:
        """A sequence and its output per document, of a request that went through preprocess()."""
        assert isinstance(request, RerankRequest)
        pairs = zip(request.pairs, request.second_texts, strict=True)
        return [
            (Sequence(next(ids), tokens, UNSAMPLED, 1, second_text=second), ScoreOutput(index))
            for index, (tokens, second) in enumerate(pairs)
        ]


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """Output of one document."""

    index: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def feed(self, token: SampledToken) -> list[Event]:
        """The document's score, and the end."""
        return [Relevance(float(np.frombuffer(token.vector, "<f4")[0]), self.index), Finish("stop", self.index)]


class _Documents:
    """The tokenizer worker's part: documents become pairs with the query, and faults of a request are found."""

    def __init__(self, key: str, tokenizer: Any, facts: RerankerFacts) -> None:
        self._key = key
        self._tokenizer = tokenizer
        self._facts = facts
        self._pairs: Pairs = (
            JudgePairs(tokenizer) if facts.is_judge else EncoderPairs(tokenizer, has_types=facts.has_types)
        )

    def preprocess(self, request: EngineRequest) -> RerankRequest:
        """The request with its pairs. Raises PromptRejected, InputTooLong, WrongKind."""
        if not isinstance(request, RerankRequest):
            raise WrongKind(self._key, "rerank")
        if request.instruction is not None and not self._pairs.takes_instruction:
            raise PromptRejected("This model reads no instruction, only the query and the documents.", "instruction")
        longest = self._facts.context_length
        cuts = request.truncates or request.max_document_tokens is not None
        cut = Cut(request.max_document_tokens, longest if cuts else None)
        pairs = self._pairs.tokenize(request.query, request.documents, request.instruction, cut)
        for index, pair in enumerate(pairs):
            if len(pair.tokens) > longest and cuts:  # without any of its document
                raise InputTooLong(len(pair.tokens), longest, "query")
            if len(pair.tokens) > longest:
                place = f"documents[{index}]"
                raise InputTooLong(len(pair.tokens), longest, place, f"{place} with the query")
        return replace(
            request, pairs=tuple(pair.tokens for pair in pairs), second_texts=tuple(pair.second for pair in pairs)
        )

    def answer(self, question: Question) -> tuple[int, ...] | str:
        """Token ids of a text, or text of ids. Raises PromptRejected, WrongKind."""
        return answer(self._key, "rerank", self._tokenizer, self._facts.vocab_size, question)
