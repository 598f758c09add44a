"""Response to a request that generates: runs a call on its model, and streams or collects the events.

Rule 1: a response owns its generations. However it ends, they are closed.
Rule 2: no header leaves before the engine has accepted all requests of the call, so that an error still has its status;
        except in a stream that waits for its model, which gets heartbeats with the load's progress.
Rule 3: a disconnect of the client cancels the response at any point: while the model loads, in the queue, or between
        tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, aclosing

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mlxserver.api.dialect import Call
from mlxserver.engine.errors import EngineError
from mlxserver.engine.events import Accepted, Event, Timings, Usage
from mlxserver.engine.worker.generation import Generation
from mlxserver.manager.instance import ModelInstance
from mlxserver.server.errors import failure_of
from mlxserver.server.model_status import progress
from mlxserver.server.request_log import note_generation

HEARTBEAT_INTERVAL = 1.0  # seconds between two heartbeats while the model loads


class GenerationResponse:
    """The response to one call. max_unread: events of a stream that may wait for a slow reader."""

    def __init__(self, instance: ModelInstance, call: Call, headers: Mapping[str, str], *, max_unread: int) -> None:
        self._instance = instance
        self._call = call
        self._encoder = call.encoder
        self._headers = headers
        self._max_unread = max_unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, unless the client disconnects first."""
        response = asyncio.create_task(self._respond(scope, receive, send))
        disconnect = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if response.done():
                await response
        finally:
            disconnect.cancel()
            response.cancel()
            await asyncio.gather(response, disconnect, return_exceptions=True)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as stack:
            submission = asyncio.create_task(self._submit(stack))
            stack.callback(submission.cancel)
            is_started = self._call.streams and await self._send_heartbeats(submission, send)
            try:
                generations, prompt_tokens = await submission
            except EngineError as error:
                if not is_started:
                    raise
                await send(body_part(self._encoder.failed(failure_of(error)[1]), is_last=True))
                return
            if self._call.streams:
                if not is_started:
                    await self._send_headers(send)
                await self._stream(generations, prompt_tokens, send)
            else:
                body = await self._collect(generations)
                await Response(body, headers=self._headers, media_type="application/json")(scope, receive, send)

    async def _submit(self, stack: ExitStack) -> tuple[list[Generation], int]:
        """The generations, once the engine has accepted all of them, and the number of their prompts' tokens."""
        for lookup in self._call.lookups:
            lookup.receive(await self._instance.ask(lookup.question))
        generations = []
        for request in self._call.requests:
            generations.append(await self._instance.generate(request, self._call.idle_timeout))
            note_generation(self._instance.key, generations[-1])
            if self._call.streams:
                generations[-1].most_unread = self._max_unread
            stack.callback(generations[-1].close)
        return generations, sum([(await generation.accepted()).prompt_tokens for generation in generations])

    async def _send_heartbeats(self, submission: asyncio.Task[object], send: Send) -> bool:
        """Send heartbeats while the model loads. Whether that started the stream: only after an interval, so that a
        call that fails at once still has its status.
        """
        is_started = False
        while not (await asyncio.wait({submission}, timeout=HEARTBEAT_INTERVAL))[0]:
            if self._instance.status == "loaded":
                continue
            if not is_started:
                await self._send_headers(send)
                is_started = True
            await send(body_part(self._encoder.heartbeat(progress(self._instance.load_progress))))
        return is_started

    async def _send_headers(self, send: Send) -> None:
        headers = {"content-type": self._encoder.content_type, "cache-control": "no-cache", **self._headers}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": encoded})

    async def _stream(self, generations: Sequence[Generation], prompt_tokens: int, send: Send) -> None:
        encoder = self._encoder
        pending = encoder.start(prompt_tokens)
        usages: list[Usage] = []
        try:
            async with aclosing(merged_events(generations)) as batches:
                async for first_choice, events in batches:
                    for event in events:
                        if isinstance(event, Usage):
                            usages.append(event)
                        elif not isinstance(event, Accepted):
                            pending += encoder.event(event, first_choice + event.index)
                    if pending:
                        await send(body_part(pending))
                        pending = b""
            pending += encoder.end(total(usages))
        except EngineError as error:
            pending += encoder.failed(failure_of(error)[1])
        await send(body_part(pending, is_last=True))

    async def _collect(self, generations: Sequence[Generation]) -> bytes:
        choices: list[list[Event]] = [[] for generation in generations for _ in range(generation.request.n)]
        usages: list[Usage] = []
        async with aclosing(merged_events(generations)) as batches:
            async for first_choice, events in batches:
                for event in events:
                    if isinstance(event, Usage):
                        usages.append(event)
                    elif not isinstance(event, Accepted):
                        choices[first_choice + event.index].append(event)
        return self._encoder.complete(choices, total(usages))


def body_part(body: bytes, is_last: bool = False) -> Message:
    """ASGI message with a part of a body."""
    return {"type": "http.response.body", "body": body, "more_body": not is_last}


async def merged_events(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, list[Event]], None]:
    """The events of all generations as they arrive, in batches, each with the number of its generation's first choice.

    Close it when reading ends early. Raises EngineError.
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


def total(usages: Sequence[Usage]) -> Usage:
    """Usage of a whole call: its generations ran side by side, so counts are added up and times are the longest."""
    if len(usages) == 1:
        return usages[0]
    times = [usage.timings for usage in usages]
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.reasoning_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        Timings(max(t.queue for t in times), max(t.prompt for t in times), max(t.generation for t in times)),
    )


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
