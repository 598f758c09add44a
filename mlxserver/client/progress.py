"""How far the loading of a model is: told as a stream of its own, or in comments of an answer that waits for it. Pure.

Rule: a stream is any number of Progress, then Loaded at the end; or LoadFailed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlxserver.api.sse import SSEDecoder
from mlxserver.client.errors import LoadFailed, StreamBroken
from mlxserver.client.models import Loaded, read_loaded
from mlxserver.client.wire import mapping, number, parse, text


@dataclass(frozen=True, slots=True)
class Progress:
    """One step. done and total: bytes of a download or of what is read, else things; None where not known.

    stage: waiting | downloading | converting | reading | warming up, or another word of the server's.
    """

    stage: str
    done: float | None = None
    total: float | None = None


class LoadReader:
    """The bytes of a load's stream, in: events, out."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._decoder = SSEDecoder()

    def feed(self, received: bytes) -> Iterator[Progress | Loaded]:
        """The events that these bytes complete. Raises LoadFailed, and StreamBroken for what is no JSON object."""
        for payload in self._decoder.feed(received):
            if payload != "[DONE]":
                yield from self._read(payload)

    def _read(self, payload: str) -> Iterator[Progress | Loaded]:
        event = parse(payload)
        if not isinstance(event, dict):
            raise StreamBroken(f"the server sent {payload[:80]!r} where a JSON object was expected.")
        if error := event.get("error"):
            raise LoadFailed(text(mapping(error).get("message")) or text(error) or "the server does not say why.")
        if event.get("event") == "progress":
            yield _read_step(event)
        if event.get("event") == "loaded":
            yield read_loaded(event, self._key)


def read_comment(comment: str) -> Progress | None:
    """The step in a comment of the form `loading {JSON}`; None for any other."""
    name, _, payload = comment.partition(" ")
    event = parse(payload) if name == "loading" else None
    return _read_step(event) if isinstance(event, dict) else None


def _read_step(event: dict[str, Any]) -> Progress:
    return Progress(text(event.get("stage")), number(event.get("done")), number(event.get("total")) or None)
