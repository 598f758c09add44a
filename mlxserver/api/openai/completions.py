"""Bare completions: the request and the dialect.

Rule: a checked prompt is a list, each item a string or a tuple of token ids; one prompt is a list of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from mlxserver.api.dialect import Call, Lookup
from mlxserver.api.openai.encoders import CompletionEncoder
from mlxserver.api.openai.generation import TOKEN_LIMIT, UNLIMITED, GeneratingRequest, check_limit
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid, parse
from mlxserver.config.settings import Settings
from mlxserver.engine.requests import Detokenize, FillPrompt, GenerationRequest, Prompt, TextPrompt, TokenPrompt

MAX_PROMPTS = 128
MAX_TOP_LOGPROBS = 5
DEFAULT_TOKENS = 16
TOKENS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
PROMPT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}},
        TOKENS | {"minItems": 1},
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": TOKENS | {"minItems": 1}},
    ]
}
TOKEN_IDS = "a non-empty list of token ids (integers from 0)"

LIMIT_OR_NONE: dict[str, Any] = {**TOKEN_LIMIT, "anyOf": [{"enum": [*UNLIMITED]}, {"minimum": 0}]}

BarePrompt = str | tuple[int, ...]


def check_tokens(value: Any, param: str) -> tuple[int, ...]:
    """Token ids, none included."""
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise invalid(param, value, "a list of token ids (integers from 0)")
    return tuple(value)


def check_limit_or_none(value: int, param: str) -> int:
    """Most tokens to generate, 0 included, or no limit. Raises ValidationFailed."""
    return 0 if value == 0 else check_limit(value, param)


def check_prompts(value: Any, param: str) -> list[BarePrompt]:
    """Every prompt. Raises ValidationFailed."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise invalid(param, value, f"a string, {TOKEN_IDS}, or a list of either")
    if all(type(item) is int for item in value):
        return [check_tokens(value, param)]
    if len(value) > MAX_PROMPTS:
        raise ValidationFailed(f"'{param}' has {len(value)} prompts. Expected at most {MAX_PROMPTS}.", param)
    return [_prompt(item, f"{param}[{index}]", type(value[0])) for index, item in enumerate(value)]


def _prompt(value: Any, param: str, kind: type) -> BarePrompt:
    if isinstance(value, str) and kind is str:
        return value
    if not isinstance(value, list) or kind is not list or not value:
        raise invalid(param, value, "a string" if kind is str else TOKEN_IDS)
    return check_tokens(value, param)


class CompletionRequest(GeneratingRequest):
    """POST /v1/completions."""

    prompt: list[BarePrompt] = Parameter(
        object,
        "What to go on from: text or token ids, one or a list of them.",
        required=True,
        check=check_prompts,
        shape=PROMPT,
    )
    max_tokens: int | None = Parameter(
        int,
        f"Most tokens to generate; {DEFAULT_TOKENS} by default, 0 for none, -1 is no limit.",
        check=check_limit_or_none,
        shape=LIMIT_OR_NONE,
    )
    suffix: str | None = Parameter(
        str, "What follows the text that is to be generated, for models that can fill in the middle; prompts are text."
    )
    echo: bool = Parameter(bool, "Begin each answer with its prompt.", default=False)
    best_of: int | None = Parameter(int, "As many as n.", ge=1)
    logprobs: int | None = Parameter(
        int,
        "Tell each token with its log-probability, and this many of the likeliest ones.",
        ge=0,
        le=MAX_TOP_LOGPROBS,
    )

    @property
    def token_limits(self) -> dict[str, int | None]:
        """Most tokens to generate, by each name that such a limit has."""
        stated = super().token_limits
        return stated if any(limit is not None for limit in stated.values()) else {"max_tokens": DEFAULT_TOKENS}

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens are needed at each position of the prompt; None for no log-probabilities."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((most for most in asked if most is not None), default=None)

    def check_together(self) -> None:
        """Refuse what can't be had together."""
        super().check_together()
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise ValidationFailed("'suffix' needs prompts of text, not of token ids.", "suffix")
        if self.suffix and self.echo and self.logprobs is not None:
            raise ValidationFailed("'echo' with 'logprobs' can't be had beside 'suffix'.", "suffix")
        if self.best_of not in (None, self.n):
            raise invalid("best_of", self.best_of, f"{self.n}, as many as 'n': answers are not made to be thrown away")


class CompletionDialect:
    """Dialect of POST /v1/completions."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)

    def parse(self, body: bytes) -> Call:
        """Read a bare completion. Raises ValidationFailed."""
        request = parse(CompletionRequest, body, self._limits)
        encoder = CompletionEncoder(request, logprobs=request.logprobs)
        return Call(
            request.model,
            [_generation_request(request, prompt) for prompt in request.prompt],
            encoder,
            streams=request.stream,
            idle_timeout=request.keep_alive,
            ignored=request.ignored,
            lookups=list(_echoes(request, encoder)) if request.echo else (),
        )


def _generation_request(request: CompletionRequest, prompt: BarePrompt) -> GenerationRequest:
    return GenerationRequest(
        _prompt_of(prompt, request.suffix),
        request.sampling,
        request.token_limit,
        request.stop,
        n=request.n,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        top_logprobs=request.logprobs,
        prompt_logprobs=request.scored,
    )


def _prompt_of(prompt: BarePrompt, suffix: str | None) -> Prompt:
    if not isinstance(prompt, str):
        return TokenPrompt(prompt)
    return FillPrompt(prompt, suffix) if suffix else TextPrompt(prompt)


def _echoes(request: CompletionRequest, encoder: CompletionEncoder) -> Iterator[Lookup]:
    """Give the encoder the texts of all prompts: those of token ids are looked up."""
    for number, prompt in enumerate(request.prompt):
        if isinstance(prompt, str):
            encoder.set_echo(number, prompt)
        else:
            yield Lookup(Detokenize(prompt), partial(encoder.set_echo, number))
