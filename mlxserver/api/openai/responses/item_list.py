"""Pages of the items that a response was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxserver.api.schema.parameters import invalid

MAX_PAGE = 100
DEFAULT_PAGE = 20


def item_page(items: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """The page of `limit` items behind the one `after`, in the `order` desc or asc. Raises ValidationFailed."""
    order, limit, after = query.get("order", "desc"), query.get("limit", str(DEFAULT_PAGE)), query.get("after")
    if order not in ("asc", "desc"):
        raise invalid("order", order, "'asc' or 'desc'")
    if not (limit.isdecimal() and limit.isascii() and len(limit) < 4 and 1 <= int(limit) <= MAX_PAGE):
        raise invalid("limit", limit, f"an integer from 1 to {MAX_PAGE}")
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        position = next((n for n, item in enumerate(ordered) if item["id"] == after), None)
        if position is None:
            raise invalid("after", after, "the id of an item of this response")
        ordered = ordered[position + 1 :]
    page = ordered[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": len(page) < len(ordered),
    }


def deleted(id: str) -> dict[str, Any]:
    """The answer to a deletion."""
    return {"id": id, "object": "response", "deleted": True}
