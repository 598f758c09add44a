"""GET /v1/library, GET /v1/library/search, DELETE /v1/models/{key}: the answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mlxserver.api.model_status import ModelStatus, RemoteModel
from mlxserver.api.openai.models import local_object


def library_list(models: Iterable[ModelStatus]) -> dict[str, Any]:
    """The models of this machine, damaged ones too, under the names that requests give."""
    return {"object": "list", "data": [_entry(model) for model in models]}


def search_results(models: Iterable[RemoteModel]) -> dict[str, Any]:
    """Models of the hub."""
    return {"object": "list", "data": [asdict(model) for model in models]}


def deleted(key: str, freed_bytes: int) -> dict[str, Any]:
    """Answer to the removal of a model, with what it took on disk."""
    return {"id": key, "object": "model", "deleted": True, "freed_bytes": freed_bytes}


def _entry(model: ModelStatus) -> dict[str, Any]:
    assert model.local is not None
    return {
        "id": model.key,
        "aliases": list(model.aliases),
        "status": {"value": model.status},
        "kind": model.kind,
        "context_length": model.context_length,
        "path": model.local.path,
        "error": model.local.fault,
        **local_object(model.local),
    }
