"""Endpoints of Anthropic's API."""

from __future__ import annotations

from mlxserver.api.anthropic.errors import ANTHROPIC
from mlxserver.api.anthropic.generation import MessagesDialect, MessagesRequest
from mlxserver.api.anthropic.prompt import CountTokensRequest
from mlxserver.api.endpoint import Endpoint

ENDPOINTS = (
    Endpoint(
        "messages",
        "POST",
        "/v1/messages",
        "Answer a conversation, in Anthropic's shape.",
        "Message",
        MessagesRequest,
        "MessageStreamEvent",
        MessagesDialect,
        api=ANTHROPIC,
    ),
    Endpoint(
        "count_tokens",
        "POST",
        "/v1/messages/count_tokens",
        "The number of tokens in a conversation.",
        "MessageTokensCount",
        CountTokensRequest,
        api=ANTHROPIC,
    ),
)
