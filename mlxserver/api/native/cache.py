"""GET /v1/cache: the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mlxserver.engine.metrics import TierUsage


def cache_usage(usages: Sequence[TierUsage]) -> dict[str, Any]:
    """What the prefix cache has: of each loaded model in each tier, and of all models on disk, null without one."""
    data = [asdict(usage) for usage in usages if usage.model]
    disk = next((asdict(usage) for usage in usages if not usage.model), None)
    if disk:
        disk = {name: value for name, value in disk.items() if name not in ("tier", "model")}
    return {"object": "list", "data": data, "disk": disk}
