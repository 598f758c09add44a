"""JSON schemas of Anthropic's answers, by name."""

from __future__ import annotations

from mlxserver.api.anthropic.errors import TYPES, TYPES_BY_CODE
from mlxserver.api.schema.response_shapes import COUNT, TEXT, Schema, each, exactly, maybe, named, one_of

STOP_REASON = one_of("end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded")


def _tagged(tag: str, **fields: Schema) -> Schema:
    """An object with this type."""
    return exactly(type={"const": tag}, **fields)


def _any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


DELTA = _any_of(
    _tagged("text_delta", text=TEXT),
    _tagged("thinking_delta", thinking=TEXT),
    _tagged("signature_delta", signature=TEXT),
    _tagged("input_json_delta", partial_json=TEXT),
)

ANTHROPIC_SCHEMAS: dict[str, Schema] = {
    "AnthropicError": _tagged(
        "error",
        error=exactly(type=one_of(*TYPES.values(), *TYPES_BY_CODE.values()), message=TEXT),
        request_id=maybe(TEXT),
    ),
    "MessageUsage": exactly(
        input_tokens=COUNT,
        cache_creation_input_tokens=COUNT,
        cache_read_input_tokens=COUNT,
        output_tokens=COUNT,
        output_tokens_details=exactly(thinking_tokens=COUNT),
    ),
    "ContentBlock": _any_of(
        _tagged("text", text=TEXT),
        _tagged("thinking", thinking=TEXT, signature=TEXT),
        _tagged("tool_use", id=TEXT, name=TEXT, input={"type": "object"}),
    ),
    "Message": _tagged(
        "message",
        id=TEXT,
        role={"const": "assistant"},
        model=TEXT,
        content=each(named("ContentBlock")),
        stop_reason=maybe(STOP_REASON),
        stop_sequence=maybe(TEXT),
        usage=named("MessageUsage"),
    ),
    "MessageStreamEvent": _any_of(
        _tagged("ping"),
        _tagged("message_start", message=named("Message")),
        _tagged("content_block_start", index=COUNT, content_block=named("ContentBlock")),
        _tagged("content_block_delta", index=COUNT, delta=DELTA),
        _tagged("content_block_stop", index=COUNT),
        _tagged(
            "message_delta",
            delta=exactly(stop_reason=STOP_REASON, stop_sequence=maybe(TEXT)),
            usage=named("MessageUsage"),
        ),
        _tagged("message_stop"),
    ),
    "MessageTokensCount": exactly(input_tokens=COUNT),
    "ModelInfo": _tagged(
        "model",
        id=TEXT,
        display_name=TEXT,
        created_at={"type": "string", "format": "date-time"},
        lifecycle=one_of("active"),
        max_input_tokens=maybe(COUNT),
        max_tokens=maybe(COUNT),
    ),
    "ModelPage": exactly(
        data=each(named("ModelInfo")), has_more={"type": "boolean"}, first_id=maybe(TEXT), last_id=maybe(TEXT)
    ),
}
