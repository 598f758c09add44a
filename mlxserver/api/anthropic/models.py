"""Models of GET /v1/models, in Anthropic's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from mlxserver.api.model_status import ModelStatus
from mlxserver.api.schema.parameters import ValidationFailed, invalid

DEFAULT_LIMIT, MAX_LIMIT = 20, 1000


def model_info(model: ModelStatus) -> dict[str, Any]:
    """One registered model. Both limits are its context, None while that is not known."""
    return {
        "type": "model",
        "id": model.key,
        "display_name": model.key,
        "created_at": datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": model.context_length,
        "max_tokens": model.context_length,
    }


def model_page(models: Sequence[ModelStatus], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of the registered models. query: limit, after_id, before_id. Raises ValidationFailed."""
    limit = _limit(query.get("limit", str(DEFAULT_LIMIT)))
    keys = [model.key for model in models]
    start, end = 0, len(models)
    if (after := query.get("after_id")) is not None:
        start = _position(keys, after, "after_id") + 1
    if (before := query.get("before_id")) is not None:
        end = _position(keys, before, "before_id")
        start = max(start, end - limit)
        page, has_more = models[start:end], start > 0
    else:
        page, has_more = models[start : start + limit], start + limit < end
    return {
        "data": [model_info(model) for model in page],
        "has_more": has_more,
        "first_id": page[0].key if page else None,
        "last_id": page[-1].key if page else None,
    }


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= (limit := int(text[:9])) <= MAX_LIMIT:
        raise invalid("limit", text, f"an integer from 1 to {MAX_LIMIT}")
    return limit


def _position(keys: Sequence[str], key: str, param: str) -> int:
    if key not in keys:
        raise ValidationFailed(f"'{param}' is no model of this list.", param)
    return keys.index(key)
