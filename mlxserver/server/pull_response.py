"""Response to a pull: its steps and its outcome, in whatever form its API has.

Rule 1: what fails before the first step and the first heartbeat has its status; what fails later is the last event.
Rule 2: a disconnect of the client cancels the pull, unless another request follows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlxserver.api.dialect import Failure
from mlxserver.api.model_status import Progress
from mlxserver.api.native.pull import PullPlan
from mlxserver.engine.errors import EngineError
from mlxserver.engine.loading.pull import Plan
from mlxserver.manager.pulls import OnStep, Pulled, Step
from mlxserver.server.errors import failure_of
from mlxserver.server.event_stream import EventStream, until_disconnect
from mlxserver.server.model_status import progress


class PullEncoder(Protocol):
    """Encoder of a pull: start(), then planned() and progress() of any number of steps, then pulled() or failed()."""

    content_type: str

    def start(self) -> bytes:
        """Bytes that a stream begins with."""

    def planned(self, plan: PullPlan) -> bytes:
        """Bytes of the plan."""

    def progress(self, progress: Progress) -> bytes:
        """Bytes of a step."""

    def pulled(self, plan: PullPlan, path: str) -> bytes:
        """Bytes that a stream ends with."""

    def complete(self, plan: PullPlan, path: str) -> bytes:
        """Body of an answer that is not streamed."""

    def failed(self, failure: Failure) -> bytes:
        """Bytes that a stream ends with instead."""

    def heartbeat(self) -> bytes:
        """Bytes that keep a stream alive while there is no step."""


class PullResponse:
    """The response to one pull. `pull` runs it and calls its argument at every step. heartbeat_interval: seconds."""

    def __init__(
        self,
        pull: Callable[[OnStep], Awaitable[Pulled]],
        encoder: PullEncoder,
        heartbeat_interval: float,
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        streams: bool,
    ) -> None:
        self._pull = pull
        self._encoder = encoder
        self._heartbeat_interval = heartbeat_interval
        self._headers = headers
        self._streams = streams
        self._steps: list[Step] = []  # that are to be sent; of several amounts the latest
        self._stepped = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, unless the client disconnects first."""
        if not self._streams:
            return await until_disconnect(receive, self._complete(scope, receive, send))
        headers = {"content-type": self._encoder.content_type, "cache-control": "no-cache", **self._headers}
        pulling = asyncio.ensure_future(self._pull(self._note))
        pulling.add_done_callback(lambda _: self._stepped.set())
        try:
            async with EventStream(send, headers, self._heartbeat_interval, self._encoder.heartbeat) as stream:
                await until_disconnect(receive, self._stream(pulling, stream), stream.beat)
        finally:
            pulling.cancel()
        return None

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        pulled = await self._pull(lambda step: None)
        body = self._encoder.complete(plan_of(pulled.plan), str(pulled.path))
        await Response(body, headers=self._headers, media_type="application/json")(scope, receive, send)

    async def _stream(self, pulling: asyncio.Future[Pulled], stream: EventStream) -> None:
        while not pulling.done():
            await self._stepped.wait()
            self._stepped.clear()
            steps, self._steps = self._steps, []
            if steps and not stream.is_started and (first := self._encoder.start()):
                await stream.write(first)
            for step in steps:
                await stream.write(self._encode(step))
        try:
            pulled = await pulling
            last = self._encoder.pulled(plan_of(pulled.plan), str(pulled.path))
        except EngineError as error:
            if not stream.is_started:
                raise
            last = self._encoder.failed(failure_of(error)[1])
        await stream.end(b"".join(map(self._encode, self._steps)) + last)

    def _encode(self, step: Step) -> bytes:
        return (
            self._encoder.planned(plan_of(step)) if isinstance(step, Plan) else self._encoder.progress(progress(step))
        )

    def _note(self, step: Step) -> None:
        if self._steps and type(self._steps[-1]) is type(step):
            self._steps.pop()
        self._steps.append(step)
        self._stepped.set()


def plan_of(plan: Plan) -> PullPlan:
    """Plain values of a plan, for the dialects."""
    return PullPlan(plan.source, plan.download_bytes, plan.needed_bytes, plan.fits)
