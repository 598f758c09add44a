"""Model cards of GET /v1/models: OpenAI's fields, with the model's state beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mlxserver.api.model_status import LocalFiles, MemoryEstimate, ModelStatus
from mlxserver.engine.requests import PolicyFacts

OWNER = "mlx-server"
CAPABILITIES = (
    *("chat", "completion", "tools", "thinking", "json_schema", "logprobs", "fill_in_middle"),
    *("vision", "embeddings", "rerank"),
)


def model_card(model: ModelStatus) -> dict[str, Any]:
    """One registered model."""
    status = {"value": model.status} if model.failure is None else {"value": model.status, "error": model.failure}
    known = model.capabilities
    return {
        "id": model.key,
        "object": "model",
        "created": model.created,
        "owned_by": OWNER,
        "status": status,
        "kind": model.kind,
        "type": model.type,
        "source": model.source,
        "context_length": model.context_length,
        "max_model_len": model.context_length,  # vLLM's name of it, and llama.cpp's
        "meta": {"n_ctx_train": model.context_length},
        "capabilities": None if known is None else {name: name in known for name in CAPABILITIES},
        "execution": asdict(model.execution) if model.execution else None,
        "policy": _policy_object(model.policy) if model.policy else None,
        "weights": model.weights,
        "kv_bits": model.kv_bits,
        "kv_group_size": model.kv_group_size,
        "memory_bytes": model.memory_bytes,
        "reserved_bytes": model.reserved_bytes,
        "estimate": estimate_object(model.estimate),
        "running_requests": model.running_requests,
        "queued_requests": model.queued_requests,
        "aliases": list(model.aliases),
        "pinned": model.is_pinned,
        "expires_in_seconds": None if model.expires_in is None else round(model.expires_in, 3),
        "loading": asdict(model.progress) if model.progress else None,
        "local": local_object(model.local) if model.local else None,
    }


def _policy_object(policy: PolicyFacts) -> dict[str, Any]:
    return asdict(policy) | {"fixed": [*policy.fixed], "measured": [*policy.measured]}


def local_object(local: LocalFiles) -> dict[str, Any]:
    """The files of a model of the library."""
    return {
        "place": local.place,
        "format": local.format,
        "architecture": local.architecture,
        "quantization": local.quantization,
        "parameters": local.parameters,
        "size_bytes": local.size_bytes,
        "needed_bytes": local.needed_bytes,
        "fits": local.fits,
    }


def model_list(models: Iterable[ModelStatus]) -> dict[str, Any]:
    """All registered models."""
    return {"object": "list", "data": [model_card(model) for model in models]}


def estimate_object(estimate: MemoryEstimate | None) -> dict[str, int] | None:
    """Memory that a model was expected to take, in bytes; None before it was estimated."""
    return None if estimate is None else {**asdict(estimate), "total": estimate.total}
