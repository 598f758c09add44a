"""What a server reports about its models: cards, the progress of a load, results of loading and unloading. Pure.

Rule 1: only `key` is always there. Fields that are this server's own extension are None if another server omits them.
Rule 2: the stream of a load is any number of Progress, then Loaded; or it raises LoadFailed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxserver.api.sse import SSEDecoder
from mlxserver.client.errors import LoadFailed, PullFailed, StreamBroken
from mlxserver.client.wire import count, mapping, mappings, number, parse, text


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One registered model. state: unloaded | loading | loaded | draining | failed. memory_bytes: what it takes, of
    this server's models with their KV cache. fields: the whole JSON object.
    """

    key: str
    state: str | None = None
    type: str | None = None
    source: str | None = None
    context_length: int | None = None
    memory_bytes: int | None = None
    running: int | None = None
    queued: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_embedding(self) -> bool:
        """Whether the model makes vectors of texts, and no text."""
        return self.fields.get("kind") == "embedding"


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of texts in their order. prompt_tokens: of all texts together; 0 if the server does not count."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a load. done, total: bytes of a download or of a read, else items; None if not known.

    stage: waiting | downloading | converting | reading | warming up, or another word of the server.
    """

    stage: str
    done: float | None = None
    total: float | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """Progress of a prompt that the server processes, in tokens; None if not known."""

    done: float | None = None
    total: float | None = None


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """Place of a request among those that wait for a slot, from 1; None if not known."""

    position: float | None = None


Wait = Progress | QueuePosition | Prefill  # what an answer waits for


@dataclass(frozen=True, slots=True)
class Loaded:
    """Result of a load: the model is ready under `key`. fields: the whole JSON object."""

    key: str
    seconds: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Unloaded:
    """Result of an unload: requests that were completed, requests that were aborted, and the memory freed."""

    key: str
    completed: int = 0
    aborted: int = 0
    freed_bytes: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Planned:
    """What a download takes. needed_bytes: memory, None if not known. fits: whether there is so much."""

    model: str
    download_bytes: int
    needed_bytes: int | None
    fits: bool


@dataclass(frozen=True, slots=True)
class Pulled:
    """Result of a download. fields: the whole JSON object."""

    model: str
    path: str
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


class _StepReader:
    """Parser of a stream of steps: bytes in, JSON objects out. failure: raised for one with an error."""

    def __init__(self, failure: type[LoadFailed | PullFailed]) -> None:
        self._failure = failure
        self._decoder = SSEDecoder()

    def objects(self, received: bytes) -> Iterator[dict[str, Any]]:
        """The objects that these bytes complete. Raises the failure, and StreamBroken for what is no JSON object."""
        for payload in self._decoder.feed(received):
            if payload != "[DONE]":
                yield self._read(payload)

    def _read(self, payload: str) -> dict[str, Any]:
        event = parse(payload)
        if not isinstance(event, dict):
            raise StreamBroken(f"the server sent {payload[:80]!r} where a JSON object was expected.")
        if error := event.get("error"):
            raise self._failure(text(mapping(error).get("message")) or text(error) or "the server gave no reason.")
        return event


class PullReader(_StepReader):
    """Parser of a download's stream: bytes in, events out."""

    def __init__(self) -> None:
        super().__init__(PullFailed)

    def feed(self, received: bytes) -> Iterator[Planned | Progress | Pulled]:
        """The events that these bytes complete. Raises PullFailed, StreamBroken."""
        for event in self.objects(received):
            model = text(event.get("model"))
            match event.get("event"):
                case "planned":
                    needed = _known(event, "needed_bytes")
                    yield Planned(model, count(event.get("download_bytes")), needed, event.get("fits") is True)
                case "progress":
                    yield _read_progress(event)
                case "pulled":
                    yield Pulled(model, text(event.get("path")), event)


class LoadReader(_StepReader):
    """Parser of a load's stream: bytes in, events out."""

    def __init__(self, key: str) -> None:
        super().__init__(LoadFailed)
        self._key = key

    def feed(self, received: bytes) -> Iterator[Progress | Loaded]:
        """The events that these bytes complete. Raises LoadFailed, and StreamBroken for what is no JSON object."""
        for event in self.objects(received):
            yield from self._read_step(event)

    def _read_step(self, event: dict[str, Any]) -> Iterator[Progress | Loaded]:
        if event.get("event") == "progress":
            yield _read_progress(event)
        if event.get("event") == "loaded":
            yield read_loaded(event, self._key)


def read_embeddings(answer: Mapping[str, Any], count_of_texts: int) -> Embeddings:
    """The vectors of an answer. Raises StreamBroken where there are not so many."""
    entries = sorted(mappings(answer.get("data")), key=lambda entry: count(entry.get("index")))
    vectors = [entry.get("embedding") for entry in entries]
    if len(vectors) != count_of_texts or not all(isinstance(vector, list) and vector for vector in vectors):
        raise StreamBroken("the server sent no vector for some of the texts.")
    numbers = tuple([tuple([number(value) or 0.0 for value in vector or ()]) for vector in vectors])
    return Embeddings(numbers, count(mapping(answer.get("usage")).get("prompt_tokens")))


def read_comment(comment: str) -> Wait | None:
    """The progress in a comment such as `loading {JSON}`; None for any other comment."""
    name, _, payload = comment.partition(" ")
    event = parse(payload) if name in ("loading", "queue", "prefill") else None
    if not isinstance(event, dict):
        return None
    if name == "queue":
        return QueuePosition(number(event.get("position")))
    if name == "prefill":
        return Prefill(number(event.get("done")), number(event.get("total")) or None)
    return _read_progress(event)


def read_card(model: dict[str, Any]) -> ModelCard:
    """Parse a model object."""
    return ModelCard(
        key=text(model.get("id")),
        state=text(mapping(model.get("status")).get("value")) or None,
        type=text(model.get("type")) or None,
        source=text(model.get("source")) or None,
        context_length=_known(model, "context_length"),
        memory_bytes=_known(model, "reserved_bytes") or _known(model, "memory_bytes"),
        running=_known(model, "running_requests"),
        queued=_known(model, "queued_requests"),
        fields=model,
    )


def read_loaded(answer: dict[str, Any], key: str) -> Loaded:
    """Parse the response to a load. key: the one of the request, for a response that names none."""
    return Loaded(text(answer.get("key")) or key, number(answer.get("load_time_seconds")), answer)


def read_unloaded(answer: dict[str, Any], key: str) -> Unloaded:
    """Parse the response to an unload. key: as in read_loaded()."""
    return Unloaded(
        text(answer.get("key")) or key,
        count(answer.get("completed_requests")),
        count(answer.get("aborted_requests")),
        count(answer.get("freed_bytes")),
        answer,
    )


def _read_progress(event: dict[str, Any]) -> Progress:
    return Progress(text(event.get("stage")), number(event.get("done")), number(event.get("total")) or None)


def _known(model: dict[str, Any], name: str) -> int | None:
    return count(model[name]) if name in model and model[name] is not None else None
