"""POST /v1/models/unload: the request and its answer."""

from __future__ import annotations

from typing import Any, Literal

from mlxserver.api.schema.parameters import Parameter, Request

DAY = 86_400  # seconds


class UnloadRequest(Request):
    """POST /v1/models/unload."""

    key: str = Parameter(str, "Key of the model.", required=True)
    mode: Literal["drain", "abort", "reject"] = Parameter(
        str,
        "drain lets running requests finish, abort ends them, reject refuses to unload while there are any.",
        default="drain",
        enum=["drain", "abort", "reject"],
    )
    timeout: float | None = Parameter(float, "Seconds that a drain may take.", gt=0, le=DAY)
    forget: bool = Parameter(bool, "Remove the key as well.", default=False)


def unloaded(key: str, *, completed: int, aborted: int, freed_bytes: int) -> dict[str, Any]:
    """Answer to an unload: requests that finished, requests that were ended, and memory given back."""
    return {
        "key": key,
        "status": "unloaded",
        "completed_requests": completed,
        "aborted_requests": aborted,
        "freed_bytes": freed_bytes,
    }
