"""POST /v1/messages: the request and the dialect."""

from __future__ import annotations

from typing import Any, ClassVar

from mlxserver.api.anthropic.encoder import MessageEncoder
from mlxserver.api.anthropic.prompt import NO_EFFECT, PromptRequest
from mlxserver.api.dialect import Call
from mlxserver.api.openai.completions import LIMIT_OR_NONE, check_limit_or_none
from mlxserver.api.openai.generation import SamplingRequest, keep_alive_parameter, stated_limit
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import Parameter, parse
from mlxserver.api.schema.validators import MAX_STOPS, check_stop
from mlxserver.config.settings import Settings
from mlxserver.engine.requests import GenerationRequest

STOPS: dict[str, Any] = {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "minLength": 1}}


class MessagesRequest(PromptRequest, SamplingRequest):
    """POST /v1/messages."""

    __no_effect__: ClassVar = NO_EFFECT

    max_tokens: int | None = Parameter(
        int,
        "Most tokens to generate, reasoning included, and never more than the context has room for. 0: the prompt is "
        "processed, and kept for the next request.",
        check=check_limit_or_none,
        shape=LIMIT_OR_NONE,
    )
    stop_sequences: tuple[str, ...] = Parameter(
        object, "Strings at which the answer ends; they are not part of it.", default=(), check=check_stop, shape=STOPS
    )
    stream: bool = Parameter(bool, "Send tokens as they are made, as server-sent events.", default=False)
    keep_alive: float | None = keep_alive_parameter()
    metadata: dict[str, Any] | None = Parameter(dict, "Accepted without effect.")
    service_tier: str | None = Parameter(str, "Accepted without effect.")

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None where none is stated."""
        return stated_limit(self.max_tokens)

    @property
    def generation_request(self) -> GenerationRequest:
        """The engine's request."""
        return GenerationRequest(
            self.prompt,
            self.sampling,
            self.token_limit,
            self.stop_sequences,
            format=self.format,
            tool_choice=self.tool_choice,
            thinking_budget=self.switches.budget,
        )


class MessagesDialect:
    """Dialect of POST /v1/messages."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)

    def parse(self, body: bytes) -> Call:
        """Read a conversation to answer. Raises ValidationFailed."""
        request = parse(MessagesRequest, body, self._limits)
        return Call(
            request.model,
            [request.generation_request],
            MessageEncoder(request.model, token_limit=request.token_limit),
            streams=request.stream,
            idle_timeout=request.keep_alive,
            ignored=(*request.ignored, *request.tools.left_out),
        )
