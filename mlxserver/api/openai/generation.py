"""What every request that generates text may say: which model, how the next token is chosen, when to stop, how to send.

Rule: a default of None leaves the matter to the model's own defaults.
"""

from __future__ import annotations

from typing import Any

from mlxserver.api.schema.parameters import Parameter, Request, ValidationFailed, invalid
from mlxserver.api.schema.validators import (
    MAX_STOPS,
    STREAM_OPTIONS,
    check_keep_alive,
    check_logit_bias,
    check_stop,
    check_stream_options,
)

MAX_CHOICES = 128  # of any server; this one may set a lower limit (api/schema/limits.py)
STOP: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "minLength": 1}},
    ]
}
LOGIT_BIAS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
KEEP_ALIVE: dict[str, Any] = {"anyOf": [{"type": "number"}, {"type": "string"}]}


class ModelRequest(Request):
    """A request to one model."""

    model: str = Parameter(str, "Key of the model that answers.", required=True)


class SamplingRequest(ModelRequest):
    """How the next token is chosen. What is not given is as the model's defaults have it."""

    temperature: float | None = Parameter(float, "Randomness; 0 is greedy.", ge=0, le=2)
    top_p: float | None = Parameter(float, "Keep the likeliest tokens up to this probability.", gt=0, le=1)
    top_k: int | None = Parameter(
        int, "Keep this many of the likeliest tokens; 0 and -1 keep all.", ge=-1, check=lambda k, _: max(k, 0)
    )
    min_p: float | None = Parameter(float, "Keep tokens at least this likely, relative to the likeliest.", ge=0, le=1)
    seed: int | None = Parameter(int, "The same seed gives the same answer.", ge=-(2**63), le=2**63 - 1)
    frequency_penalty: float | None = Parameter(
        float, "Lowers a token's logit for each time it was generated.", ge=-2, le=2
    )
    presence_penalty: float | None = Parameter(float, "Lowers a token's logit once it was generated.", ge=-2, le=2)
    repetition_penalty: float | None = Parameter(
        float, "Divides the logits of tokens seen in prompt or answer; 1 is off.", gt=0
    )
    logit_bias: dict[int, float] | None = Parameter(
        object, "Token ids and what is added to their logits.", check=check_logit_bias, shape=LOGIT_BIAS
    )


class GeneratingRequest(SamplingRequest):
    """A request that generates text."""

    max_tokens: int | None = Parameter(int, "Most tokens to generate, reasoning included.", ge=1)
    min_tokens: int = Parameter(int, "Tokens to generate before the model may end its answer.", default=0, ge=0)
    ignore_eos: bool = Parameter(bool, "Go on when the model ends its answer, up to max_tokens.", default=False)
    stop: tuple[str, ...] = Parameter(
        object, "Strings at which the answer ends; they are not part of it.", default=(), check=check_stop, shape=STOP
    )
    n: int = Parameter(int, "How many answers.", default=1, ge=1, le=MAX_CHOICES)
    stream: bool = Parameter(bool, "Send tokens as they are made, as server-sent events.", default=False)
    stream_options: dict[str, bool] = Parameter(
        object,
        "include_usage: token counts at the end. continuous_usage_stats: in every chunk, counting sent pieces.",
        default={},
        check=check_stream_options,
        shape=STREAM_OPTIONS,
    )
    keep_alive: float | None = Parameter(
        object,
        "How long the model stays loaded after this: seconds or a duration such as '5m'; below zero is for ever.",
        check=check_keep_alive,
        shape=KEEP_ALIVE,
    )
    user: str | None = Parameter(str, "Accepted without effect.")
    metadata: dict[str, Any] | None = Parameter(dict, "Accepted without effect.")
    store: bool | None = Parameter(bool, "Accepted without effect.")
    service_tier: str | None = Parameter(str, "Accepted without effect.")
    safety_identifier: str | None = Parameter(str, "Accepted without effect.")
    prompt_cache_key: str | None = Parameter(str, "Accepted without effect.")

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None goes to the end of the context."""
        return self.max_tokens

    @property
    def counts_pieces(self) -> bool:
        """Whether every chunk of the stream has token counts."""
        return self.stream_options.get("continuous_usage_stats", False)

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options.get("include_usage", False) or self.counts_pieces

    def check_together(self) -> None:
        """Refuse a lower limit above the upper one, and options of a stream where there is none."""
        limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise invalid("min_tokens", self.min_tokens, f"at most {limit}, the most tokens to generate")
        if self.stream_options and not self.stream:
            raise ValidationFailed("'stream_options' needs 'stream': true.", "stream_options")
