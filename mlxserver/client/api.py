"""ChatClient: client of this server's API, and of any other that follows OpenAI's.

Rule 1: answers are typed events (client/events.py), failures are typed errors (client/errors.py), never JSON.
Rule 2: a stream that ends is complete. Any other end raises StreamBroken, whatever was yielded before.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, Self
from urllib.parse import quote

from aiohttp import ClientResponse

from mlxserver.client.defaults import DEFAULT_BASE_URL
from mlxserver.client.errors import ApiError, NotSupported, StreamBroken
from mlxserver.client.events import Answer, Event, Finished, read_answer
from mlxserver.client.models import (
    Embeddings,
    Loaded,
    LoadReader,
    ModelCard,
    Planned,
    Progress,
    Pulled,
    PullReader,
    Unloaded,
    Wait,
    read_card,
    read_embeddings,
    read_loaded,
    read_unloaded,
)
from mlxserver.client.recorder import PreparedRequest
from mlxserver.client.stream import StreamReader
from mlxserver.client.transport import Transport, read_object
from mlxserver.client.wire import count, mappings

Message = Mapping[str, Any]


class ChatClient:
    """Client of one server, an async context manager.

    base_url: with or without /v1; None takes OPENAI_BASE_URL, else DEFAULT_BASE_URL. api_key: None takes
    OPENAI_API_KEY, which may be missing. connect_timeout, read_timeout: seconds that connecting may take, and that an
    open connection may be silent; None for no limit. Raises SettingInvalid.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        connect_timeout: float | None = 10.0,
        read_timeout: float | None = 600.0,
    ) -> None:
        self._transport = Transport(
            base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL,
            api_key or os.environ.get("OPENAI_API_KEY") or "",
            connect_timeout,
        )
        self._read_timeout = read_timeout

    @property
    def base_url(self) -> str:
        """The URL that every path is appended to."""
        return self._transport.url

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._transport.__aexit__(*error)

    async def stream(
        self,
        messages: Sequence[Message],
        model: str,
        *,
        on_progress: Callable[[Wait], None] = lambda _: None,
        **params: Any,
    ) -> AsyncGenerator[Event, None]:
        """The events of one answer as they arrive, Finished as the last.

        params: OpenAI's; those that are None are left out. on_progress: called with the progress of what the answer
        waits for. Close the generator (contextlib.aclosing) to stop an answer: that closes the connection, and
        the server stops generating. Raises ServerUnreachable, ApiError (before the first event) and StreamBroken (at
        any point).
        """
        body, reader = _streamed(messages, model, params), StreamReader(on_progress)
        async with self._transport.open("POST", "/chat/completions", body, self._read_timeout) as response:
            if response.content_type != "text/event-stream":
                raise StreamBroken(f"the server sent {response.content_type} where text/event-stream was expected.")
            async for received in response.content.iter_any():
                for event in reader.feed(received, perf_counter()):
                    yield event
                    if isinstance(event, Finished):
                        return
        for event in reader.end(perf_counter()):
            yield event

    def prepare(self, messages: Sequence[Message], model: str, **params: Any) -> PreparedRequest:
        """Encode a request for a streamed answer that is to be recorded, for measuring many at once.

        Call the result to send it. It raises ServerUnreachable; Recording.events() raises what stream() would.
        """
        return self._transport.prepare("/chat/completions", _streamed(messages, model, params), self._read_timeout)

    async def complete(self, messages: Sequence[Message], model: str, **params: Any) -> Answer:
        """One whole answer, not streamed. Raises as stream() does."""
        answer = await self._json("POST", "/chat/completions", _chat(messages, model, params))
        return read_answer(answer, perf_counter())

    async def embed(self, texts: Sequence[str], model: str) -> Embeddings:
        """Vectors of texts. Raises ServerUnreachable, ApiError, StreamBroken."""
        body = {"model": model, "input": list(texts), "encoding_format": "float"}
        return read_embeddings(await self._json("POST", "/embeddings", body), len(texts))

    async def models(self) -> list[ModelCard]:
        """All models of the server, in its order."""
        answer = await self._json("GET", "/models")
        return [read_card(model) for model in mappings(answer.get("data")) if model.get("id")]

    async def model(self, key: str) -> ModelCard:
        """One model. Raises ApiError with status 404 for an unknown key."""
        return read_card(await self._json("GET", f"/models/{quote(key, safe='')}"))

    async def library(self) -> list[ModelCard]:
        """The models on the server's machine, damaged ones too. Raises ApiError."""
        answer = await self._json("GET", "/library")
        return [read_card(model) for model in mappings(answer.get("data")) if model.get("id")]

    async def delete(self, key: str, *, force: bool = False) -> int:
        """Remove a model's files from the server's machine; the bytes that they took. Raises ApiError."""
        answer = await self._json("DELETE", f"/models/{quote(key, safe='')}{'?force=true' if force else ''}")
        return count(answer.get("freed_bytes"))

    async def search(self, words: str, limit: int) -> list[Mapping[str, Any]]:
        """Models of the Hugging Face hub, as the server finds them. Raises ApiError."""
        answer = await self._json("GET", f"/library/search?q={quote(words, safe='')}&limit={limit}")
        return [*mappings(answer.get("data"))]

    async def pull(self, model: str, *, force: bool = False) -> AsyncGenerator[Planned | Progress | Pulled, None]:
        """Download a model to the server's machine: its plan and progress, Pulled as the last event.

        Close the generator to stop the download. Raises NotSupported, ApiError, PullFailed, StreamBroken.
        """
        reader = PullReader()
        async with self._extension("/models/pull", {"model": model, "force": force, "stream": True}) as response:
            async for received in response.content.iter_any():
                for event in reader.feed(received):
                    yield event
                    if isinstance(event, Pulled):
                        return
        raise StreamBroken("the download ended without a result.")

    async def load(self, source: str, key: str | None = None, **options: Any) -> Loaded:
        """Load a model and wait until it is ready, however long that takes. Raises NotSupported, ApiError."""
        body = _given({"model": source, "key": key, **options})
        async with self._extension("/models/load", body) as response:
            return read_loaded(await read_object(response), key or source)

    async def load_stepwise(
        self, source: str, key: str | None = None, **options: Any
    ) -> AsyncGenerator[Progress | Loaded, None]:
        """Load a model: its progress, Loaded as the last event; only Loaded where the server streams no progress.

        Raises as load() does, LoadFailed if the load fails after its start, and StreamBroken.
        """
        body = _given({"model": source, "key": key, **options, "stream": True})
        reader = LoadReader(key or source)
        try:
            async with self._extension("/models/load", body) as response:
                if response.content_type != "text/event-stream":
                    yield read_loaded(await read_object(response), key or source)
                    return
                async for received in response.content.iter_any():
                    for event in reader.feed(received):
                        yield event
                        if isinstance(event, Loaded):
                            return
            raise StreamBroken("the load ended without a result.")
        except ApiError as error:
            if error.param != "stream":
                raise
        yield await self.load(source, key, **options)

    async def unload(self, key: str, mode: str = "drain", **options: Any) -> Unloaded:
        """Unload a model. mode: drain | abort | reject. options: the server's (timeout, in seconds).

        Raises NotSupported, and ApiError with status 404 for an unknown key.
        """
        body = _given({"key": key, "mode": mode, **options})
        async with self._extension("/models/unload", body) as response:
            return read_unloaded(await read_object(response), key)

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return await self._transport.json(method, path, body, self._read_timeout)

    @asynccontextmanager
    async def _extension(self, path: str, body: dict[str, Any]) -> AsyncIterator[ClientResponse]:
        """A response of an endpoint that OpenAI's API does not have. It may take long: silence has no limit."""
        try:
            async with self._transport.open("POST", path, body, read_timeout=None) as response:
                yield response
        except ApiError as error:
            # A 404 of a server that has the endpoint names the unknown model or the missing field.
            if error.status == 405 or (error.status == 404 and not error.param and error.code != "model_not_found"):
                raise NotSupported(self.base_url, path, error.status) from error
            raise


def _streamed(messages: Sequence[Message], model: str, params: dict[str, Any]) -> dict[str, Any]:
    return _chat(messages, model, {"stream_options": {"include_usage": True}, **params, "stream": True})


def _chat(messages: Sequence[Message], model: str, params: dict[str, Any]) -> dict[str, Any]:
    return _given({"model": model, "messages": list(messages), **params})


def _given(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
