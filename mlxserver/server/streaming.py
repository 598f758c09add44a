"""The response that asks the model, and streams or collects what it says.

Rule 1: an answer owns its generations. However the answer ends, they are closed.
Rule 2: no header leaves before the engine has accepted all of the request, so that an error still has its status;
        except in a stream that waits for its model, which is told how the load goes.
Rule 3: a client that leaves cancels its answer at any point: while the model loads, in the queue, or between tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, aclosing

import orjson
from starlette.types import Message, Receive, Scope, Send

from mlxserver.api import sse
from mlxserver.engine.errors import EngineError
from mlxserver.engine.events import Accepted, Event, Usage
from mlxserver.engine.requests import GenerationRequest
from mlxserver.engine.worker.generation import Generation
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.states import LoadProgress
from mlxserver.server import translation
from mlxserver.server.errors import error_body, json_response
from mlxserver.server.forms import Form
from mlxserver.server.request_log import note_generation

TELLING_INTERVAL = 1.0  # seconds between two words on how far a load is
STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


class Answer:
    """The response to a request that generates; one generation a prompt. keep_alive: seconds that the model stays.

    most_unread: events of a stream that may wait for its reader.
    """

    def __init__(
        self,
        instance: ModelInstance,
        requests: Sequence[GenerationRequest],
        form: Form,
        *,
        streams: bool,
        keep_alive: float | None,
        headers: Mapping[str, str],
        most_unread: int,
    ) -> None:
        self._instance = instance
        self._requests = requests
        self._form = form
        self._streams = streams
        self._keep_alive = keep_alive
        self._headers = headers
        self._most_unread = most_unread

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
        with ExitStack() as stack:
            opening = asyncio.create_task(self._open(stack))
            stack.callback(opening.cancel)
            is_begun = self._streams and await self._tell_loading(opening, send)
            try:
                generations, prompt_tokens = await opening
            except EngineError as error:
                if not is_begun:
                    raise
                await send(piece(sse.encode(orjson.dumps(error_body(error)[1])), is_last=True))
                return
            if self._streams:
                if not is_begun:
                    await self._begin(send)
                await self._stream(generations, prompt_tokens, send)
            else:
                content = await self._whole(generations)
                await json_response(content, headers=self._headers)(scope, receive, send)

    async def _open(self, stack: ExitStack) -> tuple[list[Generation], int]:
        """The generations, once the engine has accepted all of them, and the tokens of their prompts."""
        generations = []
        for request in self._requests:
            generations.append(await self._instance.generate(request, self._keep_alive))
            note_generation(self._instance.key, generations[-1])
            if self._streams:
                generations[-1].most_unread = self._most_unread
            stack.callback(generations[-1].close)
        return generations, sum([(await generation.accepted()).prompt_tokens for generation in generations])

    async def _tell_loading(self, opening: asyncio.Task[object], send: Send) -> bool:
        """Tell a client who waits for its model how far the load is, as comments. Whether the stream has begun by that:
        only after a while, so that what fails at once still has its status.
        """
        told: LoadProgress | None = None
        while not (await asyncio.wait({opening}, timeout=TELLING_INTERVAL))[0]:
            if self._instance.status == "loaded":
                continue
            if told is None:
                await self._begin(send)
            told = self._instance.load_progress
            await send(piece(sse.comment("loading " + orjson.dumps(translation.progress(told)).decode())))
        return told is not None

    async def _begin(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in {**STREAM_HEADERS, **self._headers}.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _stream(self, generations: Sequence[Generation], prompt_tokens: int, send: Send) -> None:
        pending = self._form.opening(prompt_tokens)
        usages: list[Usage] = []
        try:
            async with aclosing(arrivals(generations)) as arriving:
                async for first_choice, events in arriving:
                    for event in events:
                        if isinstance(event, Usage):
                            usages.append(event)
                        elif not isinstance(event, Accepted):
                            pending += self._form.chunk(event, first_choice + event.index)
                    if pending:
                        await send(piece(pending))
                        pending = b""
            pending += self._form.closing(translation.total(usages)) + sse.DONE
        except EngineError as error:
            pending += sse.encode(orjson.dumps(error_body(error)[1]))
        await send(piece(pending, is_last=True))

    async def _whole(self, generations: Sequence[Generation]) -> object:
        choices: list[list[Event]] = [[] for generation in generations for _ in range(generation.request.n)]
        usages: list[Usage] = []
        async with aclosing(arrivals(generations)) as arriving:
            async for first_choice, events in arriving:
                for event in events:
                    if isinstance(event, Usage):
                        usages.append(event)
                    elif not isinstance(event, Accepted):
                        choices[first_choice + event.index].append(event)
        return self._form.whole(choices, translation.total(usages))


def piece(body: bytes, is_last: bool = False) -> Message:
    """A part of a body, as ASGI wants it."""
    return {"type": "http.response.body", "body": body, "more_body": not is_last}


async def arrivals(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, list[Event]], None]:
    """The events of all, as they come, each lot with the number of its generation's first choice. Raises EngineError.

    Close it when reading ends early.
    """
    if len(generations) == 1:
        while events := await generations[0].events():
            yield 0, events
        return
    waiting = {asyncio.ensure_future(each.events()): n for n, each in enumerate(generations)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                if events := task.result():
                    yield number * generations[number].request.n, events
                    waiting[asyncio.ensure_future(generations[number].events())] = number
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def wait_for_departure(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
