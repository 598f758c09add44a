"""Endpoints of Ollama's API."""

from __future__ import annotations

from functools import partial

from mlxserver.api.endpoint import Endpoint
from mlxserver.api.ollama.embed import (
    OllamaEmbedDialect,
    OllamaEmbeddingsDialect,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
)
from mlxserver.api.ollama.errors import OLLAMA
from mlxserver.api.ollama.generation import OllamaChatDialect, OllamaGenerateDialect
from mlxserver.api.ollama.models import OllamaCopyRequest, OllamaDeleteRequest, OllamaShowRequest
from mlxserver.api.ollama.pull import OllamaPullRequest
from mlxserver.api.ollama.requests import OllamaChatRequest, OllamaGenerateRequest

_endpoint = partial(Endpoint, api=OLLAMA)

OLLAMA_ENDPOINTS = (
    _endpoint(
        "ollama_chat",
        "POST",
        "/api/chat",
        "Answer a conversation.",
        "OllamaChat",
        OllamaChatRequest,
        "OllamaChat",
        OllamaChatDialect,
    ),
    _endpoint(
        "ollama_generate",
        "POST",
        "/api/generate",
        "Answer one prompt, or go on from it.",
        "OllamaGenerate",
        OllamaGenerateRequest,
        "OllamaGenerate",
        OllamaGenerateDialect,
    ),
    _endpoint("ollama_tags", "GET", "/api/tags", "Every registered model, and those of the library.", "OllamaTags"),
    _endpoint("ollama_ps", "GET", "/api/ps", "Every loaded model.", "OllamaRunning"),
    _endpoint("ollama_version", "GET", "/api/version", "The version of Ollama's API.", "OllamaVersion"),
    _endpoint("ollama_show", "POST", "/api/show", "One model.", "OllamaShown", OllamaShowRequest),
    _endpoint(
        "ollama_pull",
        "POST",
        "/api/pull",
        "Download and register a model of the hub; register and load another one.",
        "OllamaProgress",
        OllamaPullRequest,
        "OllamaProgress",
    ),
    _endpoint(
        "ollama_copy",
        "POST",
        "/api/copy",
        "Give a model one more name.",
        None,
        OllamaCopyRequest,
        media="text/plain",
        manages=True,
    ),
    _endpoint(
        "ollama_delete",
        "DELETE",
        "/api/delete",
        "Take back a copied name or a model that was registered while the server runs; remove one of the library.",
        None,
        OllamaDeleteRequest,
        media="text/plain",
        manages=True,
    ),
    _endpoint(
        "ollama_embed",
        "POST",
        "/api/embed",
        "Embeddings of texts.",
        "OllamaEmbed",
        OllamaEmbedRequest,
        dialect=OllamaEmbedDialect,
    ),
    _endpoint(
        "ollama_embeddings",
        "POST",
        "/api/embeddings",
        "Embedding of a text.",
        "OllamaEmbedding",
        OllamaEmbeddingsRequest,
        dialect=OllamaEmbeddingsDialect,
    ),
    Endpoint("root", "GET", "/", "Whether there is an Ollama, as text; a page for browsers.", None, media="text/plain"),
)
