"""What the server says of its own state: that it lives, and whether it is ready.

Rule 1: it lives while it answers at all: 200, whatever state the models are in.
Rule 2: it is ready once every model that was to be there at the start has been loaded, while none of them has failed or
        is wedged, and until it stops. A model that left since, for being idle or for another one, comes back by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxserver.api import responses
from mlxserver.engine.metrics import RankReport
from mlxserver.manager.instance import ModelInstance
from model_manager import ModelManager

Body = dict[str, Any]


def life(manager: ModelManager, version: str, *, is_told_all: bool) -> Body:
    """The answer to a /health; without the models for those who may not know of them."""
    stuck = any(instance.is_stalled for instance in manager.all_instances)
    ranks = manager.ranks()
    stuck = stuck or any(rank.error for rank in ranks)
    body: Body = {"status": "degraded" if stuck else "ok"}
    if ranks:
        body["ranks"] = [_rank(rank) for rank in ranks]
    if is_told_all:
        body |= {"version": version, "uptime_seconds": round(manager.uptime, 3), "models": _models(manager.instances)}
    return body


def readiness(manager: ModelManager, key: str | None) -> tuple[int, Body]:
    """Status and answer to a /health/ready, of all models or of one. Raises ModelNotFound."""
    if key is None:
        asked = manager.instances
        missing = [instance.key for instance in asked if instance.spec.preload and not _is_serving(instance)]
    else:
        asked = [manager.instance(key)]
        missing = [instance.key for instance in asked if instance.status != "loaded" or instance.is_stalled]
    models = {"models": _models(asked)}
    if manager.is_closing:
        return 503, _unready("The server is stopping.") | models
    if missing:
        return 503, _unready(f"Not ready: {', '.join(missing)}.") | models
    return 200, {"status": "ready", **models}


def _rank(report: RankReport) -> Body:
    """How a rank is; without its address for those who may not know."""
    lost = {"error": report.error} if report.error else {}
    return {"rank": report.rank, "status": "lost" if lost else "ok", "memory_bytes": report.memory_bytes, **lost}


def _is_serving(instance: ModelInstance) -> bool:
    return instance.status != "failed" and not instance.is_stalled and instance.metrics.loads["loaded"] > 0


def _unready(message: str) -> Body:
    return {"status": "unready", **responses.error(message, "server_error", code="not_ready")}


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
