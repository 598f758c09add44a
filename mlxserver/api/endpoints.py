"""Endpoints of the server, each declared once: routes, dialects and the OpenAPI document come from here."""

from __future__ import annotations

from mlxserver.api.dialect import Failure
from mlxserver.api.endpoint import Endpoint
from mlxserver.api.native.apply_template import ApplyTemplateRequest
from mlxserver.api.native.load import LoadRequest
from mlxserver.api.native.tokenize import DetokenizeRequest, TokenizeRequest
from mlxserver.api.native.unload import UnloadRequest
from mlxserver.api.ollama.endpoints import OLLAMA_ENDPOINTS
from mlxserver.api.openai.chat import ChatCompletionRequest, ChatDialect
from mlxserver.api.openai.completions import CompletionDialect, CompletionRequest
from mlxserver.api.openai.errors import OPENAI

ENDPOINTS = (
    Endpoint(
        "chat_completions",
        "POST",
        "/v1/chat/completions",
        "Answer a conversation.",
        "ChatCompletion",
        ChatCompletionRequest,
        "ChatCompletionChunk",
        ChatDialect,
    ),
    Endpoint(
        "completions",
        "POST",
        "/v1/completions",
        "Go on from bare prompts.",
        "Completion",
        CompletionRequest,
        "CompletionChunk",
        CompletionDialect,
    ),
    Endpoint("list_models", "GET", "/v1/models", "Every registered model, loaded or not.", "ModelList"),
    Endpoint(
        "load_model", "POST", "/v1/models/load", "Load a model.", "Loaded", LoadRequest, "LoadProgress", manages=True
    ),
    Endpoint("unload_model", "POST", "/v1/models/unload", "Unload a model.", "Unloaded", UnloadRequest, manages=True),
    Endpoint("reload_models", "POST", "/v1/models/reload", "Read the settings again.", "Reloaded", manages=True),
    Endpoint("cache", "GET", "/v1/cache", "What the prefix cache has, by tier and model.", "CacheUsage", manages=True),
    Endpoint("clear_cache", "POST", "/v1/cache/clear", "Empty the prefix cache.", "CacheUsage", manages=True),
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
    *OLLAMA_ENDPOINTS,
)

APIS = {endpoint.path: endpoint.api for endpoint in ENDPOINTS}
PREFIXES = {api.prefix: api for api in APIS.values() if api.prefix}


def encode_failure(path: str, failure: Failure) -> bytes:
    """The failure as JSON, in the envelope of the API that has this path; OpenAI's where none has."""
    by_prefix = (api for prefix, api in PREFIXES.items() if path.startswith(prefix))
    return (APIS.get(path) or next(by_prefix, OPENAI)).envelope(failure)
