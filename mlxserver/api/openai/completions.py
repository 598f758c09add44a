"""Bare completions: the request and the dialect.

Rule: a checked prompt is a list, each item a string or a tuple of token ids; one prompt is a list of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from mlxserver.api.dialect import Call, Lookup
from mlxserver.api.openai.encoders import CompletionEncoder
from mlxserver.api.openai.generation import TOKEN_LIMIT, GeneratingRequest, check_limit
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid, parse
from mlxserver.config.settings import Settings
from mlxserver.engine.requests import Detokenize, GenerationRequest, TextPrompt, TokenPrompt

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

BarePrompt = str | tuple[int, ...]


def check_tokens(value: Any, param: str) -> tuple[int, ...]:
    """Token ids, none included."""
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise invalid(param, value, "a list of token ids (integers from 0)")
    return tuple(value)


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

    __unsupported__: ClassVar = {"suffix": "Text is only made at the end of a prompt."}

    prompt: list[BarePrompt] = Parameter(
        object,
        "What to go on from: text or token ids, one or a list of them.",
        required=True,
        check=check_prompts,
        shape=PROMPT,
    )
    max_tokens: int | None = Parameter(
        int,
        f"Most tokens to generate; {DEFAULT_TOKENS} by default, -1 is no limit.",
        check=check_limit,
        shape=TOKEN_LIMIT,
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

    def check_together(self) -> None:
        """Refuse what can't be had together."""
        super().check_together()
        if self.best_of not in (None, self.n):
            raise invalid("best_of", self.best_of, f"{self.n}, as many as 'n': answers are not made to be thrown away")
        if self.echo and self.logprobs is not None:
            raise ValidationFailed("'logprobs' can't be had with 'echo': a prompt has none here.", "logprobs")


class CompletionDialect:
    """Dialect of POST /v1/completions."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)

    def parse(self, body: bytes) -> Call:
        """Read a bare completion. Raises ValidationFailed."""
        request = parse(CompletionRequest, body, self._limits)
        encoder = CompletionEncoder(request, has_logprobs=request.logprobs is not None)
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
        TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(prompt),
        request.sampling,
        request.token_limit,
        request.stop,
        n=request.n,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        top_logprobs=request.logprobs,
    )


def _echoes(request: CompletionRequest, encoder: CompletionEncoder) -> Iterator[Lookup]:
    """Give the encoder the texts of all prompts: those of token ids are looked up."""
    for number, prompt in enumerate(request.prompt):
        if isinstance(prompt, str):
            encoder.set_echo(number, prompt)
        else:
            yield Lookup(Detokenize(prompt), partial(encoder.set_echo, number))
