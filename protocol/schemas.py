"""The requests that the server takes, each parameter declared once.

Rule 1: what is declared here is honoured, or says in its description that it has no effect. Nothing else is accepted.
Rule 2: handlers read plain attributes: lists, tuples, dicts, numbers and strings that are already checked.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from protocol.checks import MAX_STOPS, check_key, check_logit_bias, check_place, check_stop, check_stream_options
from protocol.messages import SHAPE as MESSAGES
from protocol.messages import check_messages
from protocol.parameters import Parameter, Request, ValidationFailed, json_schema, parse

__all__ = [
    "ChatCompletionRequest",
    "LoadRequest",
    "UnloadRequest",
    "ValidationFailed",
    "derive_key",
    "json_schema",
    "parse",
]

DAY = 86_400


class ChatCompletionRequest(Request):
    """POST /v1/chat/completions."""

    model: str = Parameter(str, "Key of the model that answers.", required=True)
    messages: list[dict[str, Any]] = Parameter(
        object, "The conversation so far.", required=True, check=check_messages, shape=MESSAGES
    )
    max_tokens: int | None = Parameter(
        int, "Most tokens to generate, reasoning included; null goes to the end of the context.", ge=1
    )
    max_completion_tokens: int | None = Parameter(int, "Another name of max_tokens.", ge=1)
    temperature: float = Parameter(float, "Randomness; 0 is greedy.", default=1.0, ge=0, le=2)
    top_p: float = Parameter(float, "Keep the likeliest tokens up to this probability.", default=1.0, gt=0, le=1)
    top_k: int = Parameter(
        int,
        "Keep this many of the likeliest tokens; 0 and -1 keep all.",
        default=0,
        ge=-1,
        check=lambda k, _: max(k, 0),
    )
    min_p: float = Parameter(
        float, "Keep tokens at least this likely, relative to the likeliest.", default=0.0, ge=0, le=1
    )
    seed: int | None = Parameter(int, "The same seed gives the same answer.", ge=-(2**63), le=2**63 - 1)
    frequency_penalty: float = Parameter(
        float, "Lowers a token's logit for each time it was generated.", default=0.0, ge=-2, le=2
    )
    presence_penalty: float = Parameter(
        float, "Lowers a token's logit once it was generated.", default=0.0, ge=-2, le=2
    )
    repetition_penalty: float = Parameter(
        float, "Divides the logits of tokens seen in prompt or answer; 1 is off.", default=1.0, gt=0
    )
    logit_bias: dict[int, float] = Parameter(
        object,
        "Token ids and what is added to their logits.",
        default={},
        check=check_logit_bias,
        shape={"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    )
    stop: tuple[str, ...] = Parameter(
        object,
        "Strings at which the answer ends; they are not part of it.",
        default=(),
        check=check_stop,
        shape={
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "minLength": 1}},
            ]
        },
    )
    stream: bool = Parameter(bool, "Send tokens as they are made, as server-sent events.", default=False)
    stream_options: dict[str, bool] = Parameter(
        object,
        "Options of a stream.",
        default={},
        check=check_stream_options,
        shape={
            "type": "object",
            "properties": {"include_usage": {"type": ["boolean", "null"]}},
            "additionalProperties": False,
        },
    )
    n: int = Parameter(int, "How many answers; one.", default=1, ge=1, le=1)
    user: str | None = Parameter(str, "Accepted without effect.")
    metadata: dict[str, Any] | None = Parameter(dict, "Accepted without effect.")
    store: bool | None = Parameter(bool, "Accepted without effect.")
    service_tier: str | None = Parameter(str, "Accepted without effect.")
    safety_identifier: str | None = Parameter(str, "Accepted without effect.")
    prompt_cache_key: str | None = Parameter(str, "Accepted without effect.")

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, by whichever of its two names it was given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options.get("include_usage", False)

    def check_together(self) -> None:
        """Refuse two different limits, and options of a stream where there is none."""
        if self.max_tokens not in (None, self.token_limit):
            message = (
                f"'max_tokens' is {self.max_tokens} but 'max_completion_tokens' {self.token_limit}. Send one of them."
            )
            raise ValidationFailed(message, "max_tokens")
        if self.stream_options and not self.stream:
            raise ValidationFailed("'stream_options' needs 'stream': true.", "stream_options")


class LoadRequest(Request):
    """POST /v1/models/load."""

    model: str = Parameter(
        str, "Source: Hugging Face id, MLX directory, .gguf file or embedded:NAME.", required=True, check=check_place
    )
    key: str | None = Parameter(str, "Name of the model in requests; by default made from the source.", check=check_key)
    type: Literal["thinking", "instruction"] | None = Parameter(
        str, "How the model is prompted; by default found out.", enum=["thinking", "instruction"]
    )
    adapter: str | None = Parameter(str, "Directory of a LoRA adapter.", check=check_place)
    context_length: int | None = Parameter(int, "Longest context in tokens; by default the model's own.", ge=1)


class UnloadRequest(Request):
    """POST /v1/models/unload."""

    key: str = Parameter(str, "Key of the model.", required=True)
    mode: Literal["drain", "abort", "reject"] = Parameter(
        str,
        "drain lets running requests finish, abort ends them, reject refuses to unload while there are any.",
        default="drain",
        enum=["drain", "abort", "reject"],
    )
    timeout: float | None = Parameter(float, "Seconds that a drain may take.", gt=0, le=DAY)


def derive_key(source: str) -> str:
    """The key of a source that was given none: its last part, "org/Name-4bit" -> "name-4bit".

    Raises ValidationFailed where nothing is left of it.
    """
    name = re.split(r"[/\\:]", source.strip().rstrip("/\\"))[-1].lower().removesuffix(".gguf")
    key = re.sub(r"[^a-z0-9._-]+", "-", name).strip("-.")[:128]
    if not key:
        raise ValidationFailed(f"No key can be made from the source {source!r}. Give one as 'key'.", "key")
    return key
