"""Seam between the server and the APIs that clients speak: a Dialect reads requests, an Encoder writes answers.

Rule 1: dialects are pure: no HTTP, no MLX, no waiting. The status of a failure is the server's (server/errors.py).
Rule 2: an encoder serves one call. A stream takes start(), event() for every event but Accepted and Usage, and end(),
        or failed() at any point instead; heartbeat() at any point before these, also before start(). A whole answer
        takes complete() alone.
Rule 3: a stream and a whole answer carry the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from mlxserver.api.model_status import ModelStatus, Progress
from mlxserver.config.settings import Settings
from mlxserver.engine.errors import Projection
from mlxserver.engine.events import Event, PrefillProgress, QueuePosition, Usage
from mlxserver.engine.requests import EngineRequest, GenerationRequest, Question

# What a stream waits for: the load of its model, a slot, its prompt.
WaitProgress = Progress | QueuePosition | PrefillProgress

FailureKind = Literal["invalid_request", "authentication", "permission", "not_found", "rate_limit", "server"]


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure, before it is put in a dialect's envelope.

    param: the field of the request that is wrong. code: what happened, as a word for programs. projection: memory that
    a load needs and that there is. request_id: by which the log knows the request.
    """

    message: str
    kind: FailureKind
    param: str | None = None
    code: str | None = None
    projection: Projection | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Api:
    """An API that programs speak. envelope: body of an error, JSON. error_schema: name of its JSON schema.

    header: one, in lower case, that its clients send with every request; None where there is none. prefix: of paths
    that are its own even where there is no such endpoint. stream_media: type of its streams, events or lines of JSON.
    ends_with_done: whether the last event of its streams is [DONE].
    """

    name: str
    envelope: Callable[[Failure], bytes]
    error_schema: str
    header: str | None = None
    ends_with_done: bool = True
    prefix: str | None = None
    stream_media: str = "text/event-stream"


class Encoder(Protocol):
    """Encoder of one call's answer. content_type: the stream's; a whole answer is JSON."""

    content_type: str

    def start(self, prompt_tokens: int) -> bytes:
        """Bytes that a stream begins with."""

    def event(self, event: Event, choice: int) -> bytes:
        """Bytes that an event adds to a stream; choices are numbered over all requests of the call."""

    def end(self, usage: Usage) -> bytes:
        """Bytes that a complete stream ends with. usage: of all requests together."""

    def failed(self, failure: Failure) -> bytes:
        """Bytes that a stream ends with instead."""

    def heartbeat(self, progress: WaitProgress | None) -> bytes:
        """Bytes that keep a stream alive while it has nothing to send. progress: of what it waits for, if known."""

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """Body of a whole answer, from the events of each choice."""


class UnstreamedEncoder:
    """Encoder of answers that are never streamed; what inherits it has complete()."""

    content_type = "application/json"

    def start(self, prompt_tokens: int) -> bytes:
        """Nothing."""
        return b""

    def event(self, event: Event, choice: int) -> bytes:
        """Nothing."""
        return b""

    def end(self, usage: Usage) -> bytes:
        """Nothing."""
        return b""

    def failed(self, failure: Failure) -> bytes:
        """Nothing."""
        return b""

    def heartbeat(self, progress: WaitProgress | None) -> bytes:
        """Nothing."""
        return b""

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """Body of the answer."""
        raise NotImplementedError


class LoadEncoder(Protocol):
    """Encoder of a load's progress: start(), then progress() of any number of steps, then loaded() or failed()."""

    content_type: str

    def start(self) -> bytes:
        """Bytes that a stream begins with."""

    def progress(self, progress: Progress) -> bytes:
        """Bytes of a step."""

    def loaded(self, model: ModelStatus) -> bytes:
        """Bytes that a stream ends with."""

    def failed(self, failure: Failure) -> bytes:
        """Bytes that a stream ends with instead."""

    def heartbeat(self) -> bytes:
        """Bytes that keep a stream alive while there is no step."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A question to the model's tokenizer, whose answer the encoder needs before the requests run."""

    question: Question
    receive: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Call:
    """What one body asks for: engine requests to one model, and how they are answered.

    requests: all with the same n; without any the model is loaded and nothing generated. idle_timeout: seconds that the
    model stays loaded afterwards, None leaves it to the model's own; 0 without requests unloads it. ignored: names of
    unknown parameters. for_client: makes the call that a client means, by the id of that client (server/keys.py), where
    that depends on what the server keeps for it; raises ValidationFailed. other_names: of the model, where none is
    registered under the first.
    """

    model: str
    requests: Sequence[EngineRequest]
    encoder: Encoder
    streams: bool = False
    idle_timeout: float | None = None
    ignored: Sequence[str] = ()
    lookups: Sequence[Lookup] = ()
    for_client: Callable[[Call, str], Call] | None = None
    other_names: Sequence[str] = ()

    def limited(self, tokens: int) -> Call:
        """The call, its answers limited to so many tokens where a request states no limit. 0 changes nothing."""
        if not tokens:
            return self
        return replace(self, requests=[_limited(request, tokens) for request in self.requests])


class Dialect(Protocol):
    """One generating endpoint of an API, built once from the settings."""

    def __init__(self, settings: Settings) -> None: ...

    def parse(self, body: bytes) -> Call:
        """Read a request. Raises ValidationFailed."""


def _limited(request: EngineRequest, tokens: int) -> EngineRequest:
    if not isinstance(request, GenerationRequest) or request.max_tokens is not None:
        return request
    return replace(request, max_tokens=max(tokens, request.min_tokens))
