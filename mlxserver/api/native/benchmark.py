"""POST /v1/benchmark: the request."""

from __future__ import annotations

from typing import Any, Literal

from mlxserver.api.schema.parameters import Parameter, Request, ValidationFailed, invalid

MAX_MODELS = 4
MAX_LEVELS = 8
MAX_CONCURRENCY = 256


def check_models(value: Any, param: str) -> list[str]:
    """Keys of models."""
    if not isinstance(value, list) or not all(isinstance(key, str) and key for key in value):
        raise invalid(param, value, "a list of keys")
    if not 1 <= len(value) <= MAX_MODELS:
        raise ValidationFailed(f"One to {MAX_MODELS} models can be measured, not {len(value)}.", param)
    return value


def check_concurrency(value: Any, param: str) -> list[int]:
    """Numbers of clients."""
    is_right = isinstance(value, list) and 1 <= len(value) <= MAX_LEVELS
    if not is_right or not all(type(each) is int and 1 <= each <= MAX_CONCURRENCY for each in value):
        raise invalid(param, value, f"a list of up to {MAX_LEVELS} numbers from 1 to {MAX_CONCURRENCY}")
    return list(value)


class BenchmarkRequest(Request):
    """POST /v1/benchmark."""

    models: list[str] = Parameter(
        object,
        "Keys of the models; of an interference, that which is measured, then the other one.",
        required=True,
        check=check_models,
        shape={"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_MODELS},
    )
    kind: Literal["sweep", "interference"] = Parameter(
        str,
        "sweep: each model at each concurrency; interference: one model alone, and during another one's work.",
        default="sweep",
        enum=["sweep", "interference"],
    )
    concurrency: list[int] = Parameter(
        object,
        "Requests that run at any time; an interference takes the first.",
        default=[1, 4, 16],
        check=check_concurrency,
        shape={"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": MAX_CONCURRENCY}},
    )
    requests: int = Parameter(int, "Requests at each load.", default=32, ge=1, le=2000)
    max_tokens: int = Parameter(int, "Tokens of each answer at most.", default=128, ge=1, le=4096)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the benchmark. Raises ValidationFailed."""
        if self.kind == "interference" and len(self.models) != 2:
            raise ValidationFailed("An interference takes two models.", "models")
        names = ("kind", "models", "concurrency", "requests", "max_tokens")
        return {name: getattr(self, name) for name in names}
