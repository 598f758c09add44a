"""POST /v1/models/reload: the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def reloaded(
    *, added: Sequence[str], removed: Sequence[str], changed: Sequence[str], restart_needed: Sequence[str]
) -> dict[str, Any]:
    """Keys of models that changed, and names of settings that take a restart to change."""
    return {
        "added": list(added),
        "removed": list(removed),
        "changed": list(changed),
        "restart_needed": list(restart_needed),
    }
