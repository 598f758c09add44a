"""Runner of embedding models: texts become sequences, and their vectors events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import Kind, ModelSpec
from mlxserver.engine import sequence
from mlxserver.engine.errors import InputTooLong, PromptRejected, WrongKind
from mlxserver.engine.events import Embedding, Event, Finish
from mlxserver.engine.loading.embedding_model import EmbeddingFacts, EmbeddingModel
from mlxserver.engine.prompt.formats import check_tokens
from mlxserver.engine.requests import (
    Detokenize,
    EmbeddingRequest,
    EngineRequest,
    ModelFacts,
    Question,
    TextPrompt,
    Tokenize,
    TokenPrompt,
)
from mlxserver.engine.sequence import SampledToken
from mlxserver.engine.worker.batch import Batch

UNSAMPLED = SamplingParams()  # of an encoder's sequences, which get no token


class EmbeddingRunner:
    """A loaded embedding model. `preprocess` and `answer` hold nothing of the batch."""

    def __init__(self, spec: ModelSpec, model: EmbeddingModel, batch: Batch) -> None:
        self.batch = batch
        self.idle_steps: Iterator[object] = iter(())
        self.facts = ModelFacts(
            None, model.context_length, model.weight_bytes, frozenset({"embeddings"}), kind="embedding"
        )
        texts = _Texts(spec.key, model.tokenizer, model.facts, model.context_length, model.vocab_size)
        self.preprocess = texts.preprocess
        self.answer = texts.answer

    def prepare(self, request: EngineRequest, ids: Iterator[int]) -> list[tuple[sequence.Sequence, VectorOutput]]:
        """A sequence and its output per text, of a request that went through preprocess()."""
        assert isinstance(request, EmbeddingRequest)
        return [
            (sequence.Sequence(next(ids), tokens, UNSAMPLED, 1), VectorOutput(index, request.dimensions))
            for index, tokens in enumerate(request.tokens)
        ]


@dataclass(frozen=True, slots=True)
class VectorOutput:
    """Output of one text. dimensions: leading values to keep, None for all."""

    index: int
    dimensions: int | None = None
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def feed(self, token: SampledToken) -> list[Event]:
        """The text's vector, and the end. A vector that is cut has the length 1 again."""
        vector = token.vector
        if self.dimensions is not None and 4 * self.dimensions < len(vector):
            kept = np.frombuffer(vector, "<f4")[: self.dimensions]
            vector = (kept / max(float(np.linalg.norm(kept)), 1e-12)).astype("<f4").tobytes()
        return [Embedding(vector, self.index), Finish("stop", self.index)]


@dataclass(frozen=True, slots=True)
class _Texts:
    """The tokenizer worker's part: texts become tokens, and faults of a request are found."""

    key: str
    tokenizer: Any
    facts: EmbeddingFacts
    context_length: int
    vocab_size: int

    def preprocess(self, request: EngineRequest) -> EmbeddingRequest:
        """The request with its tokens. Raises PromptRejected, InputTooLong, WrongKind."""
        if not isinstance(request, EmbeddingRequest):
            raise WrongKind(self.key, "embedding")
        self._check_dimensions(request.dimensions)
        tokens = self._tokens(request)
        for index, own in enumerate(tokens):
            if not own:
                raise PromptRejected(f"{request.place(index)} has no token.", request.place(index))
            if len(own) > self.context_length:
                raise InputTooLong(len(own), self.context_length, request.place(index))
        return replace(request, tokens=tuple(tokens))

    def _tokens(self, request: EmbeddingRequest) -> list[tuple[int, ...]]:
        prompt = self._prompt(request)
        texts = [prompt + each.text for each in request.texts if isinstance(each, TextPrompt)]
        tokenized = iter(self._tokenize(texts, cuts=request.truncates))
        found: list[tuple[int, ...]] = []
        for index, each in enumerate(request.texts):
            if isinstance(each, TokenPrompt):
                check_tokens(each.tokens, self.vocab_size, request.place(index))
                found.append(each.tokens[: self.context_length] if request.truncates else each.tokens)
            else:
                found.append(next(tokenized))
        return found

    def _tokenize(self, texts: Sequence[str], *, cuts: bool) -> list[tuple[int, ...]]:
        """Tokens of texts, with the model's own at both ends."""
        return _tokenized(self.tokenizer, texts, self.context_length if cuts else None)

    def _prompt(self, request: EmbeddingRequest) -> str:
        """Text to put before each text."""
        prompts = self.facts.prompts or {}
        name = request.prompt_name or self.facts.default_prompt
        if request.requires_prompt and name not in prompts:
            known = ", ".join(map(repr, prompts)) or "none"
            raise PromptRejected(f"This model has no prompt {name!r}. Its prompts: {known}.", "prompt_name")
        return prompts.get(name or "", "")

    def _check_dimensions(self, wanted: int | None) -> None:
        whole, nested = self.facts.dimensions, self.facts.nested
        if wanted in (None, whole) or (nested is None and wanted is not None and wanted < whole):
            return
        if nested and wanted in nested:
            return
        expected = f"from 1 to {whole}" if nested is None else " or ".join(map(str, (*(nested or ()), whole)))
        raise PromptRejected(f"'dimensions' is {wanted}. Expected {expected} for this model.", "dimensions")

    def answer(self, question: Question) -> tuple[int, ...] | str:
        """Token ids of a text, or text of ids. Raises PromptRejected, WrongKind."""
        return answer(self.key, "embedding", self.tokenizer, self.vocab_size, question)


def answer(key: str, kind: Kind, tokenizer: Any, vocab_size: int, question: Question) -> tuple[int, ...] | str:
    """An encoder's answer: token ids of a text, or text of ids. Raises PromptRejected, WrongKind."""
    match question:
        case Detokenize(tokens):
            check_tokens(tokens, vocab_size, "tokens")
            return str(tokenizer.decode(list(tokens)))
        case Tokenize(TextPrompt(text)):
            return _tokenized(tokenizer, [text])[0]
        case _:
            raise WrongKind(key, kind)


def _tokenized(tokenizer: Any, texts: Sequence[str], longest: int | None = None) -> list[tuple[int, ...]]:
    """Tokens of texts, cut to the longest length if there is one."""
    if not texts:
        return []
    limits = {"truncation": False} if longest is None else {"truncation": True, "max_length": longest}
    found = tokenizer(list(texts), padding=False, return_attention_mask=False, **limits)["input_ids"]
    return [tuple(tokens) for tokens in found]
