"""Endpoints about models in Ollama's API: what is registered (tags), what is loaded (ps), and one model (show)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

from mlxserver.api.model_status import ModelStatus
from mlxserver.api.ollama.encoder import timestamp
from mlxserver.api.ollama.names import name_of
from mlxserver.api.openai.generation import one_of
from mlxserver.api.schema.parameters import Parameter, Request, ValidationFailed
from mlxserver.engine.description import Description

SPOKEN_VERSION = "0.13.5"  # of Ollama, whose API this is: programs compare it with the release that they need
FORMAT = "mlx"


class NamedRequest(Request):
    """A request about one model, which has two names."""

    model: str | None = Parameter(str, "Name of the model. Required, under one of its names.")
    name: str | None = Parameter(str, "Another name of model.")

    @property
    def asked(self) -> str:
        """The name that was given; empty without one. Raises ValidationFailed if two differ."""
        return one_of({"model": self.model or None, "name": self.name or None}) or ""

    def check_together(self) -> None:
        """Refuse no name, and two that differ."""
        if not self.asked:
            raise ValidationFailed("Missing required parameter: 'model'.", "model")


class OllamaShowRequest(NamedRequest):
    """POST /api/show."""

    verbose: bool = Parameter(bool, "Accepted without effect: nothing is left out.", default=False)


class OllamaDeleteRequest(NamedRequest):
    """DELETE /api/delete."""


class OllamaCopyRequest(Request):
    """POST /api/copy."""

    source: str = Parameter(str, "Name of a model.", required=True)
    destination: str = Parameter(str, "One more name for it.", required=True)


def version() -> dict[str, str]:
    """Answer to version."""
    return {"version": SPOKEN_VERSION}


def tags(models: Iterable[tuple[str, ModelStatus, Description]]) -> dict[str, Any]:
    """Answer to tags: every name, with its model."""
    return {"models": [_entry(*model) for model in models]}


def running(models: Iterable[tuple[ModelStatus, Description]], now: float) -> dict[str, Any]:
    """Answer to ps. now: seconds since 1970."""
    return {
        "models": [
            _named(name_of(status.key), status, description)
            | {
                "size": status.reserved_bytes,
                "size_vram": status.reserved_bytes,
                "expires_at": timestamp(inf if status.expires_in is None else now + status.expires_in),
                "context_length": status.context_length or 0,
            }
            for status, description in models
        ]
    }


def shown(status: ModelStatus, description: Description, defaults: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Answer to show. defaults: sampling parameters that the model's configuration sets."""
    parameters = "\n".join(f"{name} {value:g}" for name, value in defaults)
    return {
        "modelfile": f"FROM {status.source}\n" + "".join(f"PARAMETER {line}\n" for line in parameters.splitlines()),
        "parameters": parameters,
        "template": description.template,
        "details": _details(description),
        "model_info": _model_info(status, description),
        "capabilities": _capabilities(status, description),
        "modified_at": _modified(status, description),
    }


def digest(status: ModelStatus) -> str:
    """An id of what is served under a key, in SHA-256's form: it changes with the source, not with the files."""
    return hashlib.sha256(status.source.encode(errors="backslashreplace")).hexdigest()


def _named(name: str, status: ModelStatus, description: Description) -> dict[str, Any]:
    return {"name": name, "model": name, "digest": digest(status), "details": _details(description)}


def _entry(key: str, status: ModelStatus, description: Description) -> dict[str, Any]:
    estimated = status.estimate.weights if status.estimate else 0
    size = description.stored_bytes or status.memory_bytes or estimated
    return _named(name_of(key), status, description) | {"modified_at": _modified(status, description), "size": size}


def _details(description: Description) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": FORMAT,
        "family": description.architecture,
        "families": [description.architecture] if description.architecture else [],
        "parameter_size": _in_words(description.parameters),
        "quantization_level": description.quantization,
    }


def _model_info(status: ModelStatus, description: Description) -> dict[str, Any]:
    """What is known, under GGUF's names. The context is the one that is served."""
    name = description.architecture or "unknown"
    known = {
        "general.parameter_count": description.parameters,
        f"{name}.context_length": status.context_length or description.context,
        f"{name}.embedding_length": description.width,
        f"{name}.block_count": description.layers,
        f"{name}.attention.head_count": description.heads,
        f"{name}.attention.head_count_kv": description.kv_heads,
        f"{name}.vocab_size": description.vocab,
    }
    return {"general.architecture": name} | {field: value for field, value in known.items() if value}


def _capabilities(status: ModelStatus, description: Description) -> list[str]:
    """Words of Ollama's. Any model may call tools: one without a format for it gets a plain one."""
    if status.kind in ("embedding", "rerank"):
        return [status.kind]
    thinks = status.type == "thinking" if status.type else description.may_think
    fills = "fill_in_middle" in (status.capabilities or ())
    more = {"thinking": thinks, "insert": fills, "vision": status.kind == "vision"}
    return ["completion", "tools", *(name for name, is_there in more.items() if is_there)]


def _modified(status: ModelStatus, description: Description) -> str:
    return timestamp(description.modified or status.created)


def _in_words(parameters: int) -> str:
    """A number of parameters as "134.5M"; empty for 0."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= size:
            return f"{parameters / size:.1f}{unit}"
    return str(parameters or "")
