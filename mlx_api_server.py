"""The HTTP server: routes, handlers, the one table from errors to statuses, and main().

Here, and nowhere else, the wire's vocabulary (protocol/) and the engine's (engine/types.py) are translated.

Rule 1: an answer owns its generation. However the answer ends, the generation is closed.
Rule 2: no header leaves before the engine has accepted the request, so that an error still has its status.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import uvicorn
import uvloop
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from turboapi import TurboAPI

from engine import config_sources, device, runtime, sources
from engine.config import ModelSpec, Settings
from engine.errors import (
    ConfigInvalid,
    ContextExceeded,
    EngineError,
    LoadFailed,
    ModelBusy,
    ModelExists,
    ModelNotFound,
    ModelUnloading,
    PromptRejected,
    QueueFull,
    SourceInvalid,
)
from engine.types import ChatPrompt, Delta, Event, Finish, GenerationRequest, Sampling, Usage
from engine.worker import Engine, Generation
from model_manager import ModelInstance, ModelManager
from protocol import responses, schemas, sse

log = logging.getLogger("server")

# -- configuration ----------------------------------------------------------------------------------------------------

ADAPTERS = Path(__file__).parent / "adapters"

DEFAULT_MODELS = (
    ModelSpec("smollm2", "embedded:smollm2", type="instruction", preload=True),
    ModelSpec(
        "smollm2-think", "embedded:smollm2", type="thinking", adapter=str(ADAPTERS / "smollm2-think"), preload=True
    ),
    ModelSpec("qwq", "mlx-community/QwQ-32B-4bit", type="thinking"),
    ModelSpec("mistral", "mlx-community/Mistral-7B-Instruct-v0.3-4bit", type="instruction"),
)

LAST_WORDS = 2  # seconds that answers get to leave once their generations are ended at the shutdown

# The first row that fits: exception, status, OpenAI's error type, code.
ERRORS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (ModelNotFound, 404, "not_found_error", "model_not_found"),
    (ContextExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    (PromptRejected, 400, "invalid_request_error", None),
    (SourceInvalid, 400, "invalid_request_error", "invalid_source"),
    (schemas.ValidationFailed, 400, "invalid_request_error", None),
    (ModelExists, 409, "invalid_request_error", "model_exists"),
    (ModelBusy, 409, "invalid_request_error", "model_busy"),
    (QueueFull, 429, "rate_limit_error", "queue_full"),
    (ModelUnloading, 503, "server_error", "model_unloading"),
    (LoadFailed, 503, "server_error", "load_failed"),
    (EngineError, 500, "server_error", None),
)


# -- errors -----------------------------------------------------------------------------------------------------------


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and envelope of an error that a caller may meet."""
    status, kind, code = next(row[1:] for row in ERRORS if isinstance(error, row[0]))
    default_param = "model" if isinstance(error, ModelNotFound | SourceInvalid) else None
    param = getattr(error, "param", default_param)
    return status, responses.error(str(error), kind, param=param, code=getattr(error, "code", None) or code)


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def on_known_error(request: Request, error: Exception) -> Response:
    """Answer an error of the table."""
    status, body = error_body(error)
    retry_after = getattr(error, "retry_after", None)
    return json_response(body, status, {"Retry-After": str(max(1, round(retry_after)))} if retry_after else None)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: unknown path, wrong method, body too large."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"Unknown path: {request.method} {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }.get(error.status_code, error.detail)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    return json_response(responses.error(message, kind), error.status_code, dict(error.headers or {}))


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    """Answer what nobody expected; the log has the traceback."""
    return json_response(responses.error("The server failed to process the request.", "server_error"), 500)


# -- answers ----------------------------------------------------------------------------------------------------------


class ChatAnswer:
    """The response of a chat completion. It asks the model, streams or collects, and owns the generation.

    A client that leaves cancels it at any point: while the model loads, in the queue, or between two tokens.
    """

    def __init__(self, instance: ModelInstance, request: schemas.ChatCompletionRequest) -> None:
        self._instance = instance
        self._request = request
        self._id = responses.completion_id()
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves first."""
        answer = asyncio.create_task(self._answer(scope, receive, send))
        departure = asyncio.create_task(wait_for_departure(receive))
        try:
            await asyncio.wait({answer, departure}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                await answer
        finally:
            departure.cancel()
            answer.cancel()
            await asyncio.gather(answer, departure, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = await self._instance.generate(to_generation_request(self._request))
        try:
            await generation.accepted()
            if self._request.stream:
                await self._stream(generation, send)
            else:
                await (await self._whole(generation))(scope, receive, send)
        finally:
            generation.close()

    async def _stream(self, generation: Generation, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        encoder = responses.ChunkEncoder(self._id, self._request.model, self._created)
        pending = encoder.role()
        try:
            while events := await generation.events():
                pending += b"".join(self._encode(encoder, event) for event in events)
                if pending:
                    await send({"type": "http.response.body", "body": pending, "more_body": True})
                    pending = b""
            pending += sse.DONE
        except EngineError as error:
            pending += sse.encode(orjson.dumps(error_body(error)[1]))
        await send({"type": "http.response.body", "body": pending, "more_body": False})

    def _encode(self, encoder: responses.ChunkEncoder, event: Event) -> bytes:
        match event:
            case Delta(text, "reasoning", index):
                return encoder.reasoning(text, index)
            case Delta(text, _, index):
                return encoder.content(text, index)
            case Finish(reason, index):
                return encoder.finish(reason, index)
            case Usage() if self._request.include_usage:
                return encoder.usage(to_usage(event))
        return b""

    async def _whole(self, generation: Generation) -> Response:
        events: list[Event] = []
        while arrived := await generation.events():
            events += arrived
        text = {"content": "", "reasoning": ""}
        for channel in text:
            text[channel] = "".join(e.text for e in events if isinstance(e, Delta) and e.channel == channel)
        reason = next(event.reason for event in events if isinstance(event, Finish))
        usage = next(event for event in events if isinstance(event, Usage))
        choice = responses.choice(text["content"], reason, reasoning=text["reasoning"])
        return json_response(
            responses.completion(self._id, self._request.model, self._created, [choice], to_usage(usage))
        )


async def wait_for_departure(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def to_generation_request(request: schemas.ChatCompletionRequest) -> GenerationRequest:
    """The engine's words for a chat request."""
    sampling = Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
    )
    return GenerationRequest(ChatPrompt(request.messages), sampling, request.token_limit, request.stop)


def to_usage(usage: Usage) -> dict[str, Any]:
    """The wire's words for token counts."""
    return responses.usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        cached_tokens=usage.cached_tokens,
    )


def to_model(instance: ModelInstance) -> dict[str, Any]:
    """The wire's words for a registered model."""
    facts = instance.facts
    return responses.model(
        instance.spec.key,
        created=instance.created,
        status=instance.status,
        source=instance.spec.source,
        type=facts.type if facts else instance.spec.type,
        context_length=facts.context_length if facts else instance.spec.context_length,
        memory_bytes=facts.weight_bytes if facts else 0,
        running=instance.running,
        queued=instance.waiting,
        failure=str(instance.error) if instance.error else None,
    )


# -- handlers ---------------------------------------------------------------------------------------------------------


class Handlers:
    """One method a route."""

    def __init__(self, manager: ModelManager, settings: Settings) -> None:
        self._manager = manager
        self._settings = settings

    def routes(self) -> list[Route]:
        """What the server answers."""
        return [
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/load", self.load_model, methods=["POST"]),
            Route("/v1/models/unload", self.unload_model, methods=["POST"]),
            Route("/v1/models/{key:path}", self.retrieve_model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]

    async def chat_completions(self, request: Request) -> ChatAnswer:
        """POST /v1/chat/completions."""
        asked = schemas.parse(schemas.ChatCompletionRequest, await self._body(request))
        return ChatAnswer(self._manager.instance(asked.model), asked)

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return json_response(responses.model_list([to_model(instance) for instance in self._manager.instances]))

    async def retrieve_model(self, request: Request) -> Response:
        """GET /v1/models/{key}."""
        return json_response(to_model(self._manager.instance(request.path_params["key"])))

    async def load_model(self, request: Request) -> Response:
        """POST /v1/models/load."""
        asked = schemas.parse(schemas.LoadRequest, await self._body(request))
        key = asked.key or schemas.derive_key(asked.model)
        sources.check(asked.model)
        spec = ModelSpec(key, asked.model, type=asked.type, adapter=asked.adapter, context_length=asked.context_length)
        instance = await self._manager.load(spec)
        memory_bytes = instance.facts.weight_bytes if instance.facts else 0
        return json_response(responses.loaded(key, load_time_seconds=instance.load_seconds, memory_bytes=memory_bytes))

    async def unload_model(self, request: Request) -> Response:
        """POST /v1/models/unload."""
        asked = schemas.parse(schemas.UnloadRequest, await self._body(request))
        report = await self._manager.instance(asked.key).unload(asked.mode, asked.timeout)
        return json_response(
            responses.unloaded(
                asked.key, completed=report.completed, aborted=report.aborted, freed_bytes=report.freed_bytes
            )
        )

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return json_response({"status": "ok"})

    async def _body(self, request: Request) -> bytes:
        """The whole body, unless it is longer than allowed: then 413 before it is read."""
        limit = self._settings.max_body_bytes
        body = bytearray()
        declared = request.headers.get("content-length", "")
        too_large = HTTPException(413, f"The body is longer than {limit} bytes, the limit of this server.")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
        return bytes(body)


# -- the process ------------------------------------------------------------------------------------------------------


def make_app(manager: ModelManager, settings: Settings) -> TurboAPI:
    """The ASGI application."""
    known: dict[int | type[Exception], Any] = {row[0]: on_known_error for row in ERRORS}
    return TurboAPI(
        title="Multi-Model MLX Server",
        routes=Handlers(manager, settings).routes(),
        openapi_url=None,  # the route that turboapi 0.2.8 would add does not work
        exception_handlers={**known, HTTPException: on_http_error, Exception: on_unexpected_error},
    )


class Server(uvicorn.Server):
    """uvicorn, with an orderly end: a signal stops it, and the process then ends with status 0.

    Requests get `patience` seconds to finish; then their generations are ended, and the clients are told.
    """

    def __init__(self, app: TurboAPI, manager: ModelManager, patience: float) -> None:
        async def interruptible(scope: Scope, receive: Receive, send: Send) -> None:
            # A client that leaves within its body, and what uvicorn cancels at last, deserve no traceback in the log.
            with suppress(ClientDisconnect, asyncio.CancelledError):
                await app(scope, receive, send)

        last_words = math.ceil(patience) + LAST_WORDS
        super().__init__(
            uvicorn.Config(
                interruptible, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=last_words
            )
        )
        self._manager = manager
        self._patience = patience

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, end the generations, and wait for the answers to leave."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(super().shutdown(sockets))
            tasks.create_task(self._manager.close(self._patience))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while serving, without raising them again afterwards."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def start_engine(builder: runtime.Builder) -> Any:
    """How a model's engine is started: its thread loads the model and runs it."""

    def start(spec: ModelSpec, on_death: Any) -> Engine:
        return Engine(
            spec.key,
            lambda: builder.build(spec),
            free=runtime.free_memory,
            stream=runtime.thread_stream,
            on_death=on_death,
        )

    return start


@asynccontextmanager
async def running_models(settings: Settings) -> AsyncIterator[ModelManager]:
    """The manager with its models; all are unloaded at the end."""
    manager = ModelManager(settings.models, start_engine(runtime.Builder(settings.stall_target)), device.process_bytes)
    try:
        yield manager
    finally:
        await manager.close(settings.shutdown_timeout)


def greeting(url: str, manager: ModelManager) -> str:
    """What the server says when it is ready."""
    keys = manager.keys
    example = next((i.spec.key for i in manager.instances if i.status == "loaded"), keys[0] if keys else "KEY")
    body = f'{{"model":"{example}","messages":[{{"role":"user","content":"What is the capital of France?"}}]}}'
    models = "\n".join(f"  {i.spec.key:<16} {i.status:<9} {i.spec.source}" for i in manager.instances)
    curl = f"curl -s {url}/v1/chat/completions -d '{body}'"
    return f"\nServing on {url}\n\nModels:\n{models or '  none'}\n\nTry:\n  {curl}\n"


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Serve until a signal comes."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    async with running_models(settings) as manager:
        server = Server(make_app(manager, settings), manager, settings.shutdown_timeout)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        loading = asyncio.create_task(manager.preload())
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not serving.done():
            print(greeting(url, manager), flush=True)
        await serving


def run(arguments: list[str]) -> None:
    """Read the settings, bind the address and serve. Raises ConfigInvalid, OSError."""
    settings = config_sources.build(arguments, os.environ, Settings(models=DEFAULT_MODELS))
    for spec in settings.models:
        try:
            sources.check(spec.source)
        except SourceInvalid as error:
            raise ConfigInvalid(f"model {spec.key}", spec.source, str(error)) from None
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    uvloop.run(serve(settings, listener))


def main() -> int:
    """The command line. 0: stopped by a signal; 2: wrong usage; 1: the address can't be had."""
    try:
        run(sys.argv[1:])
    except ConfigInvalid as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
