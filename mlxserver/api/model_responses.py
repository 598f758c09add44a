"""The JSON shapes of registered models, from plain values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

OWNER = "mlx-server"
CAPABILITIES = ("chat", "completion", "tools", "thinking", "json_schema", "logprobs")


def model(
    key: str,
    *,
    created: int,
    status: str,
    source: str,
    type: str | None = None,
    context_length: int | None = None,
    capabilities: Collection[str] | None = None,
    memory_bytes: int = 0,
    reserved_bytes: int = 0,
    estimate: dict[str, int] | None = None,
    running: int = 0,
    queued: int = 0,
    aliases: Sequence[str] = (),
    is_pinned: bool = False,
    expires_in: float | None = None,
    loading: dict[str, Any] | None = None,
    failure: str | None = None,
) -> dict[str, Any]:
    """One registered model.

    memory_bytes is what its weights take, reserved_bytes what it may take in all; estimate is made by estimate(), and
    loading by progress(). expires_in is in seconds; None while nothing will unload it. type, context_length and
    capabilities (some of CAPABILITIES) are None while not known; failure is why the last load failed.
    """
    return {
        "id": key,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "status": {"value": status} if failure is None else {"value": status, "error": failure},
        "type": type,
        "source": source,
        "context_length": context_length,
        "capabilities": None if capabilities is None else {name: name in capabilities for name in CAPABILITIES},
        "memory_bytes": memory_bytes,
        "reserved_bytes": reserved_bytes,
        "estimate": estimate,
        "running_requests": running,
        "queued_requests": queued,
        "aliases": list(aliases),
        "pinned": is_pinned,
        "expires_in_seconds": None if expires_in is None else round(expires_in, 3),
        "loading": loading,
    }


def estimate(weights: int, cache: int, activations: int) -> dict[str, int]:
    """What a model was expected to take before it was loaded, in bytes."""
    total = weights + cache + activations
    return {"weights": weights, "cache": cache, "activations": activations, "total": total}


def progress(stage: str, done: int, total: int) -> dict[str, Any]:
    """How far a load is; total is 0 while not known."""
    return {"stage": stage, "done": done, "total": total}


def model_list(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All registered models, each made by model()."""
    return {"object": "list", "data": list(models)}


def loaded(
    key: str, *, load_time_seconds: float, memory_bytes: int, reserved_bytes: int, estimate: dict[str, int] | None
) -> dict[str, Any]:
    """The answer to a load; the last event of one that was told as a stream, too."""
    return {
        "event": "loaded",
        "key": key,
        "status": "loaded",
        "load_time_seconds": round(load_time_seconds, 3),
        "memory_bytes": memory_bytes,
        "reserved_bytes": reserved_bytes,
        "estimate": estimate,
    }


def unloaded(key: str, *, completed: int, aborted: int, freed_bytes: int) -> dict[str, Any]:
    """The answer to an unload: requests that it let finish, requests that it ended, and memory given back."""
    return {
        "key": key,
        "status": "unloaded",
        "completed_requests": completed,
        "aborted_requests": aborted,
        "freed_bytes": freed_bytes,
    }


def reloaded(
    *, added: Sequence[str], removed: Sequence[str], changed: Sequence[str], restart_needed: Sequence[str]
) -> dict[str, Any]:
    """The answer to a reload: keys of models, and names of settings that take a restart to change."""
    return {
        "added": list(added),
        "removed": list(removed),
        "changed": list(changed),
        "restart_needed": list(restart_needed),
    }
