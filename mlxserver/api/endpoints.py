"""What the server answers: each endpoint declared once. Routes and the OpenAPI document come from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlxserver.api.schemas import (
    ApplyTemplateRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadRequest,
    Request,
    TokenizeRequest,
    UnloadRequest,
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """name: the handler's. request: the body it takes. answer: its shape's name, None for text of type `media`.

    chunk: the shape of a stream's chunks, where the request can ask for a stream. manages: whether it takes an admin
    key, where there are keys.
    """

    name: str
    method: Literal["GET", "POST"]
    path: str
    summary: str
    answer: str | None
    request: type[Request] | None = None
    chunk: str | None = None
    media: str = "text/html"
    manages: bool = False


ENDPOINTS = (
    Endpoint(
        "chat_completions",
        "POST",
        "/v1/chat/completions",
        "Answer a conversation.",
        "ChatCompletion",
        ChatCompletionRequest,
        "ChatCompletionChunk",
    ),
    Endpoint(
        "completions",
        "POST",
        "/v1/completions",
        "Go on from bare prompts.",
        "Completion",
        CompletionRequest,
        "CompletionChunk",
    ),
    Endpoint("list_models", "GET", "/v1/models", "Every registered model, loaded or not.", "ModelList"),
    Endpoint(
        "load_model", "POST", "/v1/models/load", "Load a model.", "Loaded", LoadRequest, "LoadProgress", manages=True
    ),
    Endpoint("unload_model", "POST", "/v1/models/unload", "Unload a model.", "Unloaded", UnloadRequest, manages=True),
    Endpoint("reload_models", "POST", "/v1/models/reload", "Read the settings again.", "Reloaded", manages=True),
    Endpoint("retrieve_model", "GET", "/v1/models/{key}", "One model, and what it can do.", "Model"),
    Endpoint("tokenize", "POST", "/tokenize", "The tokens of a text or a conversation.", "Tokens", TokenizeRequest),
    Endpoint("detokenize", "POST", "/detokenize", "The text of tokens.", "Prompt", DetokenizeRequest),
    Endpoint(
        "apply_template",
        "POST",
        "/apply-template",
        "The prompt that is made from a conversation.",
        "Prompt",
        ApplyTemplateRequest,
    ),
    Endpoint("health", "GET", "/health", "Whether the server is up, and in which states its models are.", "Health"),
    Endpoint(
        "ready", "GET", "/health/ready", "Whether what is to be loaded at the start is; ?model=KEY: one.", "Ready"
    ),
    Endpoint("metrics", "GET", "/metrics", "Figures for Prometheus.", None, media="text/plain", manages=True),
    Endpoint("openapi", "GET", "/openapi.json", "This description.", "OpenAPI"),
    Endpoint("docs", "GET", "/docs", "This description as a page.", None),
)
