"""GET /v1/events: its events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxserver.api.model_status import ModelStatus
from mlxserver.api.openai.models import model_card


@dataclass(frozen=True, slots=True)
class Figures:
    """What a model did in the last interval. Means in seconds, None where nothing was measured."""

    tokens_per_second: float
    ttft: float | None
    inter_token: float | None


def live_model(model: ModelStatus, figures: Figures) -> dict[str, Any]:
    """A model as in GET /v1/models, without what changes by itself, and with its figures."""
    card = model_card(model)
    del card["expires_in_seconds"]
    return {
        **card,
        "tokens_per_second": round(figures.tokens_per_second, 1),
        "ttft_seconds": None if figures.ttft is None else round(figures.ttft, 4),
        "inter_token_seconds": None if figures.inter_token is None else round(figures.inter_token, 5),
    }


def memory_object(
    *, budget: int, weights: int, held: int, kv_cache: int, prefixes: int, other: int, disk: int | None
) -> dict[str, Any]:
    """The memory budget by use, in bytes. held: by all models; what of it is no weights and no KV cache is reserved.

    disk: of the prefix cache, in no budget; None without one.
    """
    return {
        "budget": budget,
        "weights": weights,
        "kv_cache": kv_cache,
        "reserved": max(0, held - weights - kv_cache),
        "prefixes": prefixes,
        "other": other,
        "free": max(0, budget - max(held, weights + kv_cache) - prefixes - other),
        "disk": disk,
    }
