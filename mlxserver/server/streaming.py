"""Response to a request that generates: runs a call on its model, and streams or collects the events.

Rule 1: a response owns its generations. However it ends, they are closed.
Rule 2: no header leaves before the engine has accepted all requests of the call, so that an error still has its status;
        except in a stream that has waited for a heartbeat's interval.
Rule 3: a disconnect of the client cancels the response at any point: while the model loads, in the queue, or between
        tokens.
Rule 4: events go to the connection as they are delivered while nothing that came before waits; a task reads the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from contextvars import copy_context
from functools import partial

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlxserver.api.dialect import Call, WaitProgress
from mlxserver.engine.errors import EngineError
from mlxserver.engine.events import Accepted, Event, Timings, Usage
from mlxserver.engine.requests import EngineRequest
from mlxserver.engine.worker.generation import Generation
from mlxserver.manager.instance import ModelInstance
from mlxserver.server.errors import failure_of
from mlxserver.server.event_stream import EventStream, direct_writer, until_disconnect
from mlxserver.server.model_status import progress
from mlxserver.server.request_log import note_error, note_events, note_generation, note_model

_UNSEEN = (Accepted, Usage)  # events that are no part of a stream


class GenerationResponse:
    """The response to one call.

    max_unread: events of a stream that may wait for a slow reader. heartbeat_interval: most seconds of a stream without
    a byte, 0 for no limit. dialect: as metrics have it. prepare: makes of each request what the engine gets, which may
    take as long as images take to be fetched; raises PromptRejected.
    """

    def __init__(
        self,
        instance: ModelInstance,
        call: Call,
        headers: Mapping[str, str],
        *,
        max_unread: int,
        heartbeat_interval: float,
        dialect: str = "",
        prepare: Callable[[EngineRequest], Awaitable[EngineRequest]] | None = None,
    ) -> None:
        self._instance = instance
        self._call = call
        self._encoder = call.encoder
        self._headers = headers
        self._max_unread = max_unread
        self._heartbeat_interval = heartbeat_interval
        self._dialect = dialect
        self._prepare = prepare
        self._generations: list[Generation] = []
        self._event_stream: EventStream | None = None
        self._pending = b""  # what is encoded and not sent; nothing that is encoded later goes before it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, unless the client disconnects first."""
        await until_disconnect(receive, self._respond(scope, receive, send), self._beat)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as stack:
            if self._call.streams:
                headers = {"content-type": self._encoder.content_type, "cache-control": "no-cache", **self._headers}
                self._event_stream = EventStream(
                    send, headers, self._heartbeat_interval, self._heartbeat, direct_writer(scope)
                )
                async with self._event_stream as stream:
                    await self._stream(stack, stream)
            else:
                await self._submit(stack)
                body = await self._collect()
                await Response(body, headers=self._headers, media_type="application/json")(scope, receive, send)

    async def _beat(self) -> None:
        if self._event_stream:
            await self._event_stream.beat()

    async def _submit(self, stack: ExitStack) -> int:
        """Start the generations. The number of their prompts' tokens, once the engine has accepted all of them."""
        note_model(self._instance.key, is_loaded=self._instance.is_loaded)
        if not self._call.requests:
            await self._instance.hold(self._call.idle_timeout)
        for lookup in self._call.lookups:
            lookup.receive(await self._instance.ask(lookup.question))
        for asked in self._call.requests:
            # Nothing is fetched for a model that sees no images: it refuses the request as it is.
            request = await self._prepare(asked) if self._prepare and self._instance.may_see else asked
            generation = await self._instance.generate(request, self._call.idle_timeout, self._dialect)
            stack.callback(generation.close)
            note_generation(generation)
            if self._call.streams:
                generation.most_unread = self._max_unread
            self._generations.append(generation)
        return sum([(await generation.accepted()).prompt_tokens for generation in self._generations])

    def _heartbeat(self) -> bytes:
        """A heartbeat with the progress of what the stream waits for, behind what is pending."""
        return self._take_pending() + self._encoder.heartbeat(self._progress())

    def _progress(self) -> WaitProgress | None:
        if not self._generations and not self._instance.is_loaded:
            return progress(self._instance.load_progress)
        waits = [wait for generation in self._generations if (wait := generation.progress)]
        return waits[0] if waits else None

    def _take_pending(self) -> bytes:
        pending, self._pending = self._pending, b""
        return pending

    async def _stream(self, stack: ExitStack, stream: EventStream) -> None:
        encoder = self._encoder
        usages: list[Usage] = []
        try:
            self._pending = encoder.start(await self._submit(stack))
            await stream.start()
            self._take_directly(stream)
            async with aclosing(merged_events(self._generations)) as batches:
                async for first_choice, events in batches:
                    usages += [event for event in events if isinstance(event, Usage)]
                    self._pending += self._encode(first_choice, events)
                    if self._pending:
                        await stream.write(self._take_pending())
            self._pending += encoder.end(total(usages))
        except EngineError as error:
            if not stream.is_started:
                raise
            failure = failure_of(error)[1]
            note_error(failure)
            self._pending += encoder.failed(failure)
        await stream.end(self._take_pending())

    def _encode(self, first_choice: int, events: Sequence[Event]) -> bytes:
        """Chunks of a generation's events, but for Accepted and Usage."""
        note_events(events)
        encode = self._encoder.event
        return b"".join([encode(e, first_choice + e.index) for e in events if not isinstance(e, _UNSEEN)])

    def _take_directly(self, stream: EventStream) -> None:
        """Have events sent as they are delivered, in the context of this response, by which its record is found."""
        for number, generation in enumerate(self._generations):
            send = partial(self._send_now, stream, number * generation.request.n)
            generation.take = partial(copy_context().run, send)

    def _send_now(self, stream: EventStream, first_choice: int, events: Sequence[Event]) -> bool:
        """Send events past the task of the response, if nothing that came before is to be sent."""
        if self._pending or not stream.can_write():
            return False
        try:
            chunks = self._encode(first_choice, events)
        except Exception:
            return False  # to be raised in that task
        if chunks:
            stream.write_now(chunks)
        return True

    async def _collect(self) -> bytes:
        choices: list[list[Event]] = [[] for generation in self._generations for _ in range(generation.request.n)]
        usages: list[Usage] = []
        async with aclosing(merged_events(self._generations)) as batches:
            async for first_choice, events in batches:
                note_events(events)
                for event in events:
                    if isinstance(event, Usage):
                        usages.append(event)
                    elif not isinstance(event, Accepted):
                        choices[first_choice + event.index].append(event)
        return self._encoder.complete(choices, total(usages))


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
    times = [usage.timings for usage in usages] or [Timings(0.0, 0.0, 0.0)]
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.reasoning_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        Timings(max(t.queue for t in times), max(t.prompt for t in times), max(t.generation for t in times)),
    )
