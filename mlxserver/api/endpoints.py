"""Endpoints of the server, each declared once: routes, dialects and the OpenAPI document come from here."""

from __future__ import annotations

from collections.abc import Container

from mlxserver.api.anthropic import endpoints as anthropic
from mlxserver.api.anthropic.errors import ANTHROPIC
from mlxserver.api.dialect import Api, Failure
from mlxserver.api.endpoint import Endpoint
from mlxserver.api.native.apply_template import ApplyTemplateRequest
from mlxserver.api.native.benchmark import BenchmarkRequest
from mlxserver.api.native.load import LoadRequest
from mlxserver.api.native.page import RenderRequest, SessionRequest
from mlxserver.api.native.pin import PinRequest
from mlxserver.api.native.pull import PullRequest
from mlxserver.api.native.rerank import RerankDialect, RerankRequest
from mlxserver.api.native.tokenize import DetokenizeRequest, TokenizeRequest
from mlxserver.api.native.unload import UnloadRequest
from mlxserver.api.ollama.endpoints import OLLAMA_ENDPOINTS
from mlxserver.api.ollama.errors import OLLAMA
from mlxserver.api.openai.chat import ChatCompletionRequest, ChatDialect
from mlxserver.api.openai.completions import CompletionDialect, CompletionRequest
from mlxserver.api.openai.embeddings import EmbeddingsDialect, EmbeddingsRequest
from mlxserver.api.openai.errors import OPENAI
from mlxserver.api.openai.responses import endpoints as responses

# Of the same endpoint: Jina's, a short one that proxies and front ends ask for, and that of Cohere's second API.
RERANK_PATHS = {"rerank": "/v1/rerank", "rerank_short": "/rerank", "rerank_v2": "/v2/rerank"}

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
    Endpoint(
        "embeddings",
        "POST",
        "/v1/embeddings",
        "Vectors of texts.",
        "EmbeddingList",
        EmbeddingsRequest,
        dialect=EmbeddingsDialect,
    ),
    *(
        Endpoint(
            name,
            "POST",
            path,
            "Relevance of documents to a query.",
            "Rerank",
            RerankRequest,
            dialect=RerankDialect,
            dialect_name="rerank",
        )
        for name, path in RERANK_PATHS.items()
    ),
    *responses.ENDPOINTS,
    *anthropic.ENDPOINTS,
    Endpoint(
        "list_models",
        "GET",
        "/v1/models",
        "Every registered model, loaded or not.",
        "ModelList",
        others=("ModelPage",),
    ),
    Endpoint(
        "load_model", "POST", "/v1/models/load", "Load a model.", "Loaded", LoadRequest, "LoadProgress", manages=True
    ),
    Endpoint("unload_model", "POST", "/v1/models/unload", "Unload a model.", "Unloaded", UnloadRequest, manages=True),
    Endpoint("reload_models", "POST", "/v1/models/reload", "Read the settings again.", "Reloaded", manages=True),
    Endpoint("list_library", "GET", "/v1/library", "The models that are on this machine, damaged ones too.", "Library"),
    Endpoint(
        "search_library",
        "GET",
        "/v1/library/search",
        "Models of the Hugging Face hub: ?q=WORDS&limit=N.",
        "SearchResults",
        manages=True,
    ),
    Endpoint(
        "pull_model",
        "POST",
        "/v1/models/pull",
        "Download a model of the Hugging Face hub.",
        "Pulled",
        PullRequest,
        "PullStep",
        manages=True,
    ),
    Endpoint("cache", "GET", "/v1/cache", "What the prefix cache has, by tier and model.", "CacheUsage", manages=True),
    Endpoint("clear_cache", "POST", "/v1/cache/clear", "Empty the prefix cache.", "CacheUsage", manages=True),
    Endpoint(
        "retrieve_model",
        "GET",
        "/v1/models/{key}",
        "One model, and what it can do.",
        "Model",
        others=("ModelInfo",),
    ),
    Endpoint(
        "delete_model",
        "DELETE",
        "/v1/models/{key}",
        "Remove a model's files; ?force=true: those of a loaded one, too.",
        "Deleted",
        manages=True,
    ),
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
    Endpoint(
        "events",
        "GET",
        "/v1/events",
        "The state of models and memory, then its changes, as server-sent events.",
        None,
        media="text/event-stream",
    ),
    Endpoint("pin_model", "POST", "/v1/models/pin", "Pin a model, or unpin it.", "Pinned", PinRequest, manages=True),
    Endpoint(
        "list_requests",
        "GET",
        "/v1/requests",
        "The last requests; ?after=CURSOR: what is new.",
        "RequestList",
        manages=True,
    ),
    Endpoint(
        "retrieve_request",
        "GET",
        "/v1/requests/{id}",
        "One of the last requests, with its timeline.",
        "RequestTrace",
        manages=True,
    ),
    Endpoint(
        "benchmark",
        "POST",
        "/v1/benchmark",
        "Measure models under load; a stream of progress and figures.",
        None,
        BenchmarkRequest,
        media="text/event-stream",
        manages=True,
    ),
    Endpoint("render", "POST", "/v1/render", "Markdown as safe HTML.", "Rendered", RenderRequest),
    Endpoint("session", "GET", "/page/session", "What this browser may do.", "Session"),
    Endpoint("open_session", "POST", "/page/session", "Let this browser in with a key.", "Session", SessionRequest),
    Endpoint("close_session", "DELETE", "/page/session", "End the session of this browser.", "Session"),
    Endpoint("page_file", "GET", "/page/{name}", "A file of the page.", None),
    Endpoint("openapi", "GET", "/openapi.json", "This description.", "OpenAPI"),
    Endpoint("docs", "GET", "/docs", "This description as a page.", None),
    *OLLAMA_ENDPOINTS,
)

APIS = (ANTHROPIC, OLLAMA)  # beside OpenAI's
APIS_BY_PATH = {endpoint.path: endpoint.api for endpoint in ENDPOINTS}


def api_of(path: str, headers: Container[str] = ()) -> Api:
    """The API that a client speaks: that of the path, or, at a path of no other API, the one its headers tell."""
    if (api := APIS_BY_PATH.get(path, OPENAI)) is not OPENAI:
        return api
    by_prefix = (each for each in APIS if each.prefix and path.startswith(each.prefix))
    by_header = (each for each in APIS if each.header and each.header in headers)
    return next(by_prefix, None) or next(by_header, OPENAI)


def encode_failure(path: str, failure: Failure, headers: Container[str] = ()) -> bytes:
    """The failure as JSON, in the envelope of the API that a client speaks who sent these headers to this path."""
    return api_of(path, headers).envelope(failure)
