"""Liveness and readiness of the server.

Rule 1: the server is live while it responds at all: 200, whatever state the models are in.
Rule 2: it is ready once every model to preload has been loaded, while none of them has failed or is stalled, and until
        it stops. A model that was unloaded since, for being idle or for another one, is loaded again on demand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxserver.api.dialect import Failure
from mlxserver.api.openai.errors import error_object
from mlxserver.engine.metrics import RankReport
from mlxserver.manager.instance import ModelInstance
from model_manager import ModelManager

Body = dict[str, Any]


def liveness(manager: ModelManager, version: str, *, shows_models: bool) -> Body:
    """Body of GET /health. shows_models: False for clients that may not know of them."""
    ranks = manager.ranks()
    is_degraded = any(instance.is_stalled for instance in manager.all_instances) or any(rank.error for rank in ranks)
    body: Body = {"status": "degraded" if is_degraded else "ok"}
    if ranks:
        body["ranks"] = [_rank(rank) for rank in ranks]
    if shows_models:
        body |= {"version": version, "uptime_seconds": round(manager.uptime, 3), "models": _models(manager.instances)}
    return body


def readiness(manager: ModelManager, key: str | None) -> tuple[int, Body]:
    """Status and body of GET /health/ready, of all models or of one. Raises ModelNotFound."""
    if key is None:
        shown = manager.instances
        missing = [instance.key for instance in shown if instance.spec.preload and not _is_serving(instance)]
    else:
        shown = [manager.instance(key)]
        missing = [instance.key for instance in shown if not instance.is_loaded or instance.is_stalled]
    models = {"models": _models(shown)}
    if manager.is_closing:
        return 503, _unready("The server is stopping.") | models
    if missing:
        return 503, _unready(f"Not ready: {', '.join(missing)}.") | models
    return 200, {"status": "ready", **models}


def _rank(report: RankReport) -> Body:
    """State of a rank; never its address."""
    lost = {"error": report.error} if report.error else {}
    return {"rank": report.rank, "status": "lost" if lost else "ok", "memory_bytes": report.memory_bytes, **lost}


def _is_serving(instance: ModelInstance) -> bool:
    return instance.status != "failed" and not instance.is_stalled and instance.metrics.loads["loaded"] > 0


def _unready(message: str) -> Body:
    return {"status": "unready", **error_object(Failure(message, "server", code="not_ready"))}


def _models(instances: Sequence[ModelInstance]) -> Body:
    return {
        instance.key: {
            "status": instance.status,
            "wedged": instance.is_stalled,
            "preload": instance.spec.preload,
            "running_requests": instance.running,
            "queued_requests": instance.waiting,
            **({"error": instance.failure_reason} if instance.failure_reason else {}),
        }
        for instance in instances
    }
