"""Tolerant reading of JSON from a server: a value of an unexpected type reads as empty, and nothing raises."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any


def parse(payload: str) -> Any:
    """The JSON value of a text; None if it is no JSON."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        return None


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list, or an empty list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text(value: Any) -> str:
    """A JSON string, or an empty one."""
    return value if isinstance(value, str) else ""


def count(value: Any) -> int:
    """A JSON integer, or 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def number(value: Any) -> float | None:
    """A finite JSON number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if isfinite(value) else None
    except OverflowError:
        return None
