"""What a server tells of its models, and of their loading and unloading.

Rule: only `key` is sure. Fields that are this server's own extension are None where another server does not send them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxserver.client.wire import count, mapping, number, text


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One registered model. state: unloaded | loading | loaded | draining | failed. fields: all that was sent."""

    key: str
    state: str | None = None
    type: str | None = None
    source: str | None = None
    context_length: int | None = None
    memory_bytes: int | None = None
    running: int | None = None
    queued: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model is ready under `key`. fields: all that the server sent."""

    key: str
    seconds: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A model is gone: requests that ended whole, requests that were cut, and the memory that came back."""

    key: str
    completed: int = 0
    aborted: int = 0
    freed_bytes: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


def read_card(model: dict[str, Any]) -> ModelCard:
    """The wire's model object."""
    return ModelCard(
        key=text(model.get("id")),
        state=text(mapping(model.get("status")).get("value")) or None,
        type=text(model.get("type")) or None,
        source=text(model.get("source")) or None,
        context_length=_known(model, "context_length"),
        memory_bytes=_known(model, "memory_bytes"),
        running=_known(model, "running_requests"),
        queued=_known(model, "queued_requests"),
        fields=model,
    )


def read_loaded(answer: dict[str, Any], key: str) -> Loaded:
    """The wire's answer to a load; `key` is what was asked for, should the answer not name it."""
    return Loaded(text(answer.get("key")) or key, number(answer.get("load_time_seconds")), answer)


def read_unloaded(answer: dict[str, Any], key: str) -> Unloaded:
    """The wire's answer to an unload."""
    return Unloaded(
        text(answer.get("key")) or key,
        count(answer.get("completed_requests")),
        count(answer.get("aborted_requests")),
        count(answer.get("freed_bytes")),
        answer,
    )


def _known(model: dict[str, Any], name: str) -> int | None:
    return count(model[name]) if name in model and model[name] is not None else None
