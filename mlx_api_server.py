"""The server's process: its models, its application, its start and its end.

What it answers is in server/: there, and nowhere else, the wire's vocabulary (protocol/) and the engine's
(engine/types.py) are translated.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from turboapi import TurboAPI

from engine import config_sources, device, memory, runtime, sources
from engine.config import ModelSpec, Settings
from engine.errors import ConfigInvalid, SourceInvalid
from engine.loading import Loading
from engine.metrics import ModelMetrics
from engine.threads import Threads
from engine.worker import Engine
from model_manager import ModelManager, Reload
from server import logs
from server.access import Access
from server.errors import exception_handlers
from server.handlers import TITLE, Handlers

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


def make_app(manager: ModelManager, settings: Settings, reload: Callable[[], Awaitable[Reload]]) -> TurboAPI:
    """The ASGI application."""
    return TurboAPI(
        title=TITLE,
        routes=Handlers(manager, settings, reload).routes(),
        openapi_url=None,  # the route that turboapi 0.2.8 would add does not work; ours is one of the handlers
        exception_handlers=exception_handlers(),
    )


class Server(uvicorn.Server):
    """uvicorn, with an orderly end: a signal stops it, and the process then ends with status 0.

    Requests get `patience` seconds to finish; then their generations are ended, and the clients are told.
    """

    def __init__(
        self, app: TurboAPI, manager: ModelManager, patience: float, reload: Callable[[], Awaitable[Reload]]
    ) -> None:
        traced = Access(app)

        async def interruptible(scope: Scope, receive: Receive, send: Send) -> None:
            # A client that leaves within its body, and what uvicorn cancels at last, deserve no traceback in the log.
            with suppress(ClientDisconnect, asyncio.CancelledError):
                await traced(scope, receive, send)

        last_words = math.ceil(patience) + LAST_WORDS
        super().__init__(
            uvicorn.Config(
                interruptible, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=last_words
            )
        )
        self._manager = manager
        self._patience = patience
        self._reload = reload
        self._reloading: asyncio.Future[Reload] | None = None

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
        loop.add_signal_handler(signal.SIGHUP, self._handle_reload)
        yield

    def _handle_reload(self) -> None:
        """Read the settings again, because of a signal. Wrong ones change nothing."""
        self._reloading = asyncio.ensure_future(self._reload())
        self._reloading.add_done_callback(_log_failure)


def _log_failure(reloading: asyncio.Future[Reload]) -> None:
    if not reloading.cancelled() and (error := reloading.exception()):
        log.error("The settings were not reloaded: %s", error)


def start_engine(builder: runtime.Builder, threads: Threads) -> Any:
    """How a model's engine is started: its thread loads the model and runs it."""

    def start(spec: ModelSpec, on_death: Any, loading: Loading, metrics: ModelMetrics) -> Engine:
        return Engine(
            spec.key,
            lambda: builder.build(spec, loading, metrics),
            free=runtime.free_memory,
            stream=runtime.finished_work,
            on_death=on_death,
            metrics=metrics,
            start=threads.start,
        )

    return start


@asynccontextmanager
async def running_models(settings: Settings) -> AsyncIterator[ModelManager]:
    """The manager with its models; all are unloaded at the end."""
    threads = Threads(runtime.thread_stream)
    manager = ModelManager(
        settings,
        start_engine(runtime.Builder(settings.stall_target), threads),
        device.process_bytes,
        lambda spec: threads.call(lambda: memory.estimate(spec)),
    )
    try:
        yield manager
    finally:
        await manager.close(settings.shutdown_timeout)
        threads.close()


def greeting(url: str, manager: ModelManager) -> str:
    """What the server says when it is ready."""
    keys = manager.keys
    example = next((i.spec.key for i in manager.instances if i.status == "loaded"), keys[0] if keys else "KEY")
    question = (
        '"messages":[{"role":"user","content":"What is the capital of France?"}],"max_tokens":100,"temperature":0'
    )
    body = f'{{"model":"{example}",{question}}}'
    models = "\n".join(f"  {i.spec.key:<16} {i.status:<9} {i.spec.source}" for i in manager.instances)
    curl = f"curl -s {url}/v1/chat/completions -d '{body}'"
    return f"\nServing on {url}\n\nModels:\n{models or '  none'}\n\nTry:\n  {curl}\n"


async def serve(settings: Settings, listener: socket.socket, reread: Callable[[], Settings]) -> None:
    """Serve until a signal comes. `reread` gives the settings as they are now, or raises ConfigInvalid."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    async with running_models(settings) as manager:

        async def reload() -> Reload:
            changed = await asyncio.to_thread(reread)
            logs.configure(changed.log_level, settings.log_format)
            return await manager.reload(changed)

        server = Server(make_app(manager, settings, reload), manager, settings.shutdown_timeout, reload)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        loading = asyncio.create_task(manager.preload())
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not serving.done():
            print(greeting(url, manager), flush=True)
        await serving


def read_settings(arguments: list[str]) -> Settings:
    """The settings, their sources checked as far as that goes without the network. Raises ConfigInvalid."""
    settings = config_sources.build(arguments, os.environ, Settings(models=DEFAULT_MODELS))
    for spec in settings.models:
        try:
            sources.check(spec.source)
        except SourceInvalid as error:
            raise ConfigInvalid(f"model {spec.key}", spec.source, str(error)) from None
    return settings


def run(arguments: list[str]) -> None:
    """Read the settings, bind the address and serve. Raises ConfigInvalid, OSError."""
    settings = read_settings(arguments)
    if config_sources.only_checks(arguments):
        print(f"The settings are right. Models: {', '.join(spec.key for spec in settings.models) or 'none'}.")
        return
    logs.configure(settings.log_level, settings.log_format)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    uvloop.run(serve(settings, listener, lambda: read_settings(arguments)))


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
