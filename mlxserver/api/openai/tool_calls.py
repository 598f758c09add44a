"""Tool calls of an answer, as JSON objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxserver.engine.events import Event, ToolCallDelta


def tool_call_delta(event: ToolCallDelta) -> dict[str, Any]:
    """Part of a call in a stream; the first part of each call has its id and its name."""
    if event.id is None:
        return {"index": event.call, "function": {"arguments": event.arguments}}
    return {"index": event.call, **_tool_call(event.id, event.name, event.arguments)}


def tool_calls(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Whole calls of a choice, put together from their deltas."""
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, ToolCallDelta):
            call = calls.setdefault(event.call, _tool_call(event.id or "", event.name or "", ""))
            call["function"]["arguments"] += event.arguments
    return list(calls.values())


def _tool_call(id: str, name: str | None, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
