"""Runner of text models: requests become sequences, and their tokens text.

Rule 1: every fault of a request for this model is found in prepare(), before a sequence exists.
Rule 2: the request's settings win over the model's defaults, those over SamplingParams'.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import ContextExceeded, PromptRejected, WrongKind
from mlxserver.engine.events import Event, PromptLogprobs
from mlxserver.engine.kv_cache.checkpoints import needs_checkpoints
from mlxserver.engine.loading.loader import LoadedModel
from mlxserver.engine.output.reasoning_formats import turn_ends
from mlxserver.engine.output.stream import OutputStream
from mlxserver.engine.output.token_bytes import prompt_tokens, token_logprob
from mlxserver.engine.prompt.formats import FORMATS, PromptFormat, check_tokens, find_type
from mlxserver.engine.prompt.images import ImageProcessor
from mlxserver.engine.prompt.truncation import most_tokens, truncate
from mlxserver.engine.requests import (
    ApplyTemplate,
    ChatPrompt,
    Detokenize,
    EngineRequest,
    Execution,
    FormattedPrompt,
    GenerationRequest,
    ModelFacts,
    Question,
    Tokenize,
    TokenPrompt,
)
from mlxserver.engine.runners.request_constraints import RequestConstraints
from mlxserver.engine.sampling.grammars import Grammars
from mlxserver.engine.sequence import PromptImages, SampledToken, Sequence
from mlxserver.engine.worker.batch import Batch

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_CAPABILITIES = frozenset({"chat", "completion", "tools", "json_schema", "logprobs"})  # of every text model


class ModelBatch(Batch, Protocol):
    """The batch of a real model."""

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, as the logits have it."""

    @property
    def execution(self) -> Execution | None:
        """Paths that serve the model; None where ranks share it."""

    @property
    def reserved_kv_bytes(self) -> int | None:
        """KV cache that is reserved with the model; None where ranks share it."""

    def warm_up(self, longest: int) -> Iterator[object]:
        """Compute shapes that requests will use, one per step of the iterator. longest: tokens of a sequence."""

    def longest(self, most: int) -> int:
        """Tokens of the longest sequence, of `most` at most, that memory could hold alone."""


class TextRunner:
    """A loaded text model. `tokenizer`, `preprocess` and `answer` hold nothing of the batch.

    images: processor of those that it sees; None of a text model.
    """

    def __init__(
        self, spec: ModelSpec, loaded: LoadedModel, batch: ModelBatch, images: ImageProcessor | None = None
    ) -> None:
        self.batch: Batch = batch
        self.tokenizer = loaded.tokenizer
        self.tokenizer.eos_token_ids = turn_ends(loaded.tokenizer, loaded.tokenizer.eos_token_ids)
        kind = spec.type or find_type(loaded.tokenizer)
        # The leader's model has no layers, and what the ranks' ones keep is not known here.
        needs_boundaries = spec.prefix_cache_bytes > 0 and (bool(spec.shard) or needs_checkpoints(loaded.model))
        prompts = FORMATS[kind](loaded.tokenizer, loaded.config, finds_boundaries=needs_boundaries, images=images)
        grammars = Grammars(loaded.tokenizer, batch.vocab_size)
        self.facts = ModelFacts(
            kind,
            batch.longest(loaded.context_length),
            loaded.weight_bytes,
            _capabilities(kind, prompts, grammars),
            batch.execution,
            batch.reserved_kv_bytes,
        )
        self.idle_steps: Iterator[object] = batch.warm_up(self.facts.context_length)
        self._longest = batch.longest
        self._defaults: Mapping[str, Any] = {**loaded.generation_defaults, **spec.defaults}
        self._max_running = spec.max_running
        self._repeats_unclosed = spec.unclosed_thinking == "content"
        self._vocab_size = batch.vocab_size
        self._last_token = max(loaded.tokenizer.get_vocab().values(), default=0)
        self._prompts = prompts
        self._constraints = RequestConstraints(loaded.tokenizer, prompts, grammars, batch.vocab_size)
        preprocessor = _Preprocessor(
            spec.key, loaded.tokenizer, prompts, self._constraints, batch.vocab_size, loaded.context_length
        )
        self.preprocess = preprocessor.preprocess
        self.answer = preprocessor.answer

    def prepare(self, request: EngineRequest, ids: Iterator[int]) -> list[tuple[Sequence, TextOutput]]:
        """A sequence and its output per choice.

        Raises:
            PromptRejected: the model can't take this; the error names the parameter.
            ContextExceeded: the prompt is longer than the context.
        """
        assert isinstance(request, GenerationRequest)  # preprocess() has refused any other
        self._check(request)
        prompt = request.formatted or self._prompts.format(request.prompt, request.tool_choice)
        param = "prompt.conversation" if isinstance(request.prompt, ChatPrompt) else "prompt"
        # A checkpoint may have fewer embeddings than its tokenizer has tokens.
        if self._last_token >= self._vocab_size or isinstance(request.prompt, TokenPrompt):
            check_tokens(prompt.tokens, self._vocab_size, param)
        max_tokens = self._max_tokens(request, len(prompt.tokens), param)
        sampling = SamplingParams(**{**self._defaults, **request.sampling})
        grammar = self._constraints.grammar(request)
        seen = self._seen(prompt)
        choices = []
        for index in range(request.n):
            sequence = Sequence(
                next(ids),
                prompt.tokens,
                sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index),
                max(1, max_tokens),  # the first step is the last prompt token's
                request.top_logprobs,
                self._constraints.constraint(request, prompt, grammar),
                boundaries=prompt.boundaries,
                prompt_logprobs=request.prompt_logprobs,
                images=seen,
            )
            choices.append((sequence, self._output(request, prompt, max_tokens, index)))
        return choices

    def _max_tokens(self, request: GenerationRequest, prompt_tokens: int, param: str) -> int:
        """Most tokens of an answer: as many as are asked for, and have room. Raises ContextExceeded."""
        context = self._longest(self.facts.context_length)  # other models may have been pinned since
        room = context - prompt_tokens
        if room < 0 or (room == 0 and request.max_tokens != 0):
            raise ContextExceeded(prompt_tokens, context, param)
        return room if request.max_tokens is None else min(request.max_tokens, room)

    def _seen(self, prompt: FormattedPrompt) -> PromptImages | None:
        """The images of a prompt as its sequences have them; None without."""
        return None

    def _check(self, request: GenerationRequest) -> None:
        if request.n > self._max_running:
            raise PromptRejected(
                f"n is {request.n}, but this model runs at most {self._max_running} sequences at once.", "n"
            )
        check_tokens(request.sampling.get("logit_bias", ()), self._vocab_size, "sampling.logit_bias")

    def _output(self, request: GenerationRequest, prompt: FormattedPrompt, max_tokens: int, index: int) -> TextOutput:
        stream = OutputStream(
            self.tokenizer,
            eos={*self.tokenizer.eos_token_ids, *prompt.ends},
            max_tokens=max_tokens,
            stop=request.stop,
            thinking=self._constraints.parser(request, prompt, index),
            tools=self._constraints.tool_parser(request, index),
            ignore_eos=request.ignore_eos,
            repeats_unclosed=self._repeats_unclosed,
            index=index,
        )
        return TextOutput(stream, self.tokenizer, prompt.tokens, index)


def _capabilities(kind: str, prompts: PromptFormat, grammars: Grammars) -> frozenset[str]:
    """What a text model can do."""
    more = {"thinking"} if kind == "thinking" else set()
    more |= {"fill_in_middle"} if prompts.fills_in_middle else set()
    return (_CAPABILITIES | more) - (set() if grammars.is_usable else {"json_schema"})


@dataclass(frozen=True, slots=True)
class _Preprocessor:
    """The tokenizer worker's part: holds nothing of the batch."""

    key: str
    tokenizer: TokenizerWrapper
    prompts: PromptFormat
    constraints: RequestConstraints
    vocab_size: int
    context_length: int

    def preprocess(self, request: EngineRequest) -> GenerationRequest:
        """The request with its prompt rendered, its grammar compiled. Raises PromptRejected, WrongKind."""
        if not isinstance(request, GenerationRequest):
            raise WrongKind(self.key, "text")
        grammar = self.constraints.compile(request)
        return replace(request, formatted=self._format(request), grammar=grammar)

    def _format(self, request: GenerationRequest) -> FormattedPrompt:
        prompt, choice = request.prompt, request.tool_choice
        if isinstance(prompt, ChatPrompt) and prompt.drops_oldest:
            most = most_tokens(self.context_length, request.max_tokens)
            return truncate(prompt, lambda shorter: self.prompts.format(shorter, choice), most)
        return self.prompts.format(prompt, choice)

    def answer(self, question: Question) -> tuple[int, ...] | str:
        """Token ids of a prompt, text of ids, or a conversation in the model's template. Raises PromptRejected."""
        match question:
            case Detokenize(tokens):
                check_tokens(tokens, self.vocab_size, "tokens")
                return str(self.tokenizer.decode(list(tokens)))
            case Tokenize(prompt):
                return self.prompts.format(prompt).tokens
            case ApplyTemplate(prompt):
                return self.prompts.format(prompt).text


@dataclass(frozen=True, slots=True)
class TextOutput:
    """Output of one choice: sampled tokens become the events of an OutputStream."""

    stream: OutputStream
    tokenizer: TokenizerWrapper
    prompt: tuple[int, ...]
    index: int

    @property
    def completion_tokens(self) -> int:
        """Number of tokens that were fed."""
        return self.stream.completion_tokens

    @property
    def reasoning_tokens(self) -> int:
        """Number of those that were reasoning."""
        return self.stream.reasoning_tokens

    def feed(self, token: SampledToken) -> abc.Sequence[Event]:
        """The events of a token."""
        logprob = None
        if token.logprobs:
            logprob = token_logprob(self.tokenizer, token.token, token.logprobs.chosen, token.logprobs.top)
        events = self.stream.feed(token.token, logprob)
        if token.prompt_logprobs is None:
            return events
        scored = prompt_tokens(self.tokenizer, self.prompt, token.prompt_logprobs)
        return [PromptLogprobs(scored, self.index), *events]
