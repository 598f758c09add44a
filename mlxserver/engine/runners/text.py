"""A request becomes rows for the batch, and for each row what reads its tokens and what binds them.

Rule 1: everything that can be wrong with a request for this model is found here, before a row exists.
Rule 2: the request's settings win over the model's defaults, those over Sampling's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from mlxserver.engine.errors import ContextExceeded, PromptRejected
from mlxserver.engine.events import Event
from mlxserver.engine.output.stream import OutputStream
from mlxserver.engine.output.token_bytes import token_logprob
from mlxserver.engine.output.tool_calls import make_tool_parser
from mlxserver.engine.prompt.formats import PromptFormat
from mlxserver.engine.requests import (
    ApplyTemplate,
    ChatPrompt,
    Detokenize,
    FormattedPrompt,
    GenerationRequest,
    ModelFacts,
    Question,
    Sampling,
    SamplingOptions,
    Tokenize,
)
from mlxserver.engine.runners.request_constraints import RequestConstraints
from mlxserver.engine.sampling.grammars import Grammars
from mlxserver.engine.sequence import SampledToken, Sequence

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def resolve(options: SamplingOptions, defaults: Mapping[str, Any]) -> Sampling:
    """The request's sampling over the model's defaults."""
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    return Sampling(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


@dataclass(frozen=True, slots=True)
class _Reading:
    """An output stream that takes the batch's tokens as they come."""

    stream: OutputStream
    tokenizer: TokenizerWrapper

    @property
    def completion_tokens(self) -> int:
        """Tokens fed."""
        return self.stream.completion_tokens

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that were reasoning."""
        return self.stream.reasoning_tokens

    def feed(self, token: SampledToken) -> list[Event]:
        """The events that a token brings."""
        if token.logprobs is None:
            return [*self.stream.feed(token.token)]
        spelled = token_logprob(self.tokenizer, token.token, token.logprobs.chosen, token.logprobs.top)
        return [*self.stream.feed(token.token, spelled)]


class RequestPreparation:
    """Prepares the requests of one model. `defaults` are sampling settings, `vocab_size` and `max_rows` the batch's."""

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        prompts: PromptFormat,
        facts: ModelFacts,
        grammars: Grammars,
        *,
        defaults: Mapping[str, Any],
        vocab_size: int,
        max_rows: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._facts = facts
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._binding = RequestConstraints(tokenizer, prompts, grammars, vocab_size)

    def preprocess(self, request: GenerationRequest) -> GenerationRequest:
        """The request with what of prepare() takes long done: its prompt formatted, its grammar compiled.

        May run on any thread. Raises PromptRejected.
        """
        self._binding.compile(request)
        return replace(request, formatted=self._prompts.format(request.prompt, request.tool_choice))

    def prepare(self, request: GenerationRequest, sequence_ids: Iterator[int]) -> list[tuple[Sequence, _Reading]]:
        """A row and its output stream for each choice.

        Raises:
            PromptRejected: the model can't take this; the error names the parameter.
            ContextExceeded: the prompt is longer than the context.
        """
        self._check(request)
        prompt = request.formatted or self._prompts.format(request.prompt, request.tool_choice)
        self._check_tokens(prompt.tokens, "messages" if isinstance(request.prompt, ChatPrompt) else "prompt")
        room = self._facts.context_length - len(prompt.tokens)
        if room < 1:
            raise ContextExceeded(len(prompt.tokens), self._facts.context_length)
        max_tokens = min(request.max_tokens or room, room)
        sampling = resolve(request.sampling, self._defaults)
        grammar = self._binding.grammar(request)
        choices = []
        for index in range(request.n):
            row = Sequence(
                next(sequence_ids),
                prompt.tokens,
                sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index),
                max_tokens,
                request.top_logprobs,
                self._binding.constraint(request, prompt, grammar),
            )
            choices.append((row, _Reading(self._stream(request, prompt, max_tokens, index), self._tokenizer)))
        return choices

    def answer(self, question: Question) -> tuple[int, ...] | str:
        """Token ids of a prompt, text of ids, or a conversation in the model's template. Raises PromptRejected."""
        match question:
            case Detokenize(tokens):
                self._check_tokens(tokens, "tokens")
                return str(self._tokenizer.decode(list(tokens)))
            case Tokenize(prompt):
                return self._prompts.format(prompt).tokens
            case ApplyTemplate(prompt):
                return self._prompts.format(prompt).text

    def _check(self, request: GenerationRequest) -> None:
        if request.n > self._max_rows:
            raise PromptRejected(f"n is {request.n}, but this model decodes at most {self._max_rows} rows.", "n")
        self._check_tokens(request.sampling.logit_bias or (), "logit_bias")
        if request.thinking_budget and not self._prompts.thinks:
            raise PromptRejected(
                f"thinking_budget is {request.thinking_budget}, but this model does not think; leave it out.",
                "thinking_budget",
            )

    def _check_tokens(self, tokens: Iterable[int], param: str) -> None:
        """Refuse tokens that do not exist: MLX would read or write beyond the end of an array."""
        last = self._vocab_size - 1
        for token in tokens:
            if not 0 <= token <= last:
                raise PromptRejected(f"{param}: this model has no token {token}; expected 0 to {last}.", param)

    def _stream(self, request: GenerationRequest, prompt: FormattedPrompt, max_tokens: int, index: int) -> OutputStream:
        return OutputStream(
            self._tokenizer,
            eos=self._tokenizer.eos_token_ids,
            max_tokens=max_tokens,
            stop=request.stop,
            thinking=self._binding.parser(request, prompt),
            tools=make_tool_parser(self._prompts.tool_format, request, index),
            ignore_eos=request.ignore_eos,
            index=index,
        )
