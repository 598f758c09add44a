"""POST /v1/models/pin: the request and its answer."""

from __future__ import annotations

from typing import Any

from mlxserver.api.schema.parameters import Parameter, Request


class PinRequest(Request):
    """POST /v1/models/pin."""

    key: str = Parameter(str, "Key of the model.", required=True)
    pin: bool = Parameter(bool, "Never evict the model, nor unload it for being idle.", default=True)


def pinned(key: str, *, is_pinned: bool) -> dict[str, Any]:
    """Answer to a pin."""
    return {"key": key, "pinned": is_pinned}
