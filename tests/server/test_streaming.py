"""The response to a call, over a scripted engine and a dialect of lines: streaming knows no dialect of the wire."""

import asyncio

import pytest

from mlxserver.api.dialect import Call, Lookup
from mlxserver.engine.errors import LoadFailed, PromptRejected
from mlxserver.engine.requests import Detokenize
from mlxserver.server.streaming import GenerationResponse
from tests.support.managed import managed
from tests.support.scripted_engine import request, until, within_deadline


class LineEncoder:
    """A word per line; a whole answer is one line."""

    content_type = "text/plain"

    def __init__(self):
        self.echo = ""

    def start(self, prompt_tokens):
        return f"start {prompt_tokens} {self.echo}\n".encode()

    def event(self, event, choice):
        return f"{type(event).__name__} {choice}\n".encode()

    def end(self, usage):
        return f"end {usage.completion_tokens}\n".encode()

    def failed(self, failure):
        return f"failed {failure.kind} {failure.code}\n".encode()

    def heartbeat(self, progress):
        return f"heartbeat {progress.stage}\n".encode()

    def complete(self, choices, usage):
        return f"{[len(events) for events in choices]} {usage.completion_tokens}\n".encode()

    def set_echo(self, text):
        self.echo = text


class Client:
    """The ASGI side of a client, which disconnects once `leave()` is called."""

    def __init__(self):
        self.status, self.headers, self.body, self._left = None, {}, b"", asyncio.Event()

    async def receive(self):
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message["body"]

    def leave(self):
        self._left.set()

    @property
    def lines(self):
        return self.body.decode().splitlines()


def call(text="hello", max_tokens=2, **fields):
    return Call("a", [request(text, max_tokens)], LineEncoder(), **{"streams": True, **fields})


def respond(manager, client, call, headers=()):
    response = GenerationResponse(manager.instance("a"), call, dict(headers), max_unread=1000)
    return asyncio.create_task(response({"type": "http"}, client.receive, client.send))


@within_deadline
async def test_a_stream_is_what_its_encoder_makes_of_the_events():
    client = Client()
    async with managed() as (manager, _):
        await respond(manager, client, call(), {"x-ignored-parameters": "b"})
    assert client.status == 200
    assert client.headers == {"content-type": "text/plain", "cache-control": "no-cache", "x-ignored-parameters": "b"}
    assert client.lines == ["start 5 ", "Delta 0", "Delta 0", "Finish 0", "end 2"]


@within_deadline
async def test_choices_are_numbered_over_all_requests_of_a_call():
    client = Client()
    async with managed() as (manager, _):
        both = Call("a", [request("hello", 1), request("hey", 1)], LineEncoder(), streams=True)
        await respond(manager, client, both)
    start, *events, end = client.lines
    assert (start, sorted(events), end) == ("start 8 ", ["Delta 0", "Delta 1", "Finish 0", "Finish 1"], "end 2")


@within_deadline
async def test_a_whole_answer_is_json_of_its_encoder():
    client = Client()
    async with managed() as (manager, _):
        await respond(manager, client, call(streams=False))
    assert (client.status, client.headers["content-type"]) == (200, "application/json")
    assert client.body == b"[3] 2\n"


@within_deadline
async def test_an_error_before_the_first_header_is_raised_for_its_status():
    client = Client()
    async with managed() as (manager, _):
        with pytest.raises(PromptRejected):
            await respond(manager, client, call("refuse"))
    assert client.status is None


@within_deadline
async def test_an_error_in_a_stream_is_its_encoders():
    client = Client()
    async with managed() as (manager, factory):
        response = respond(manager, client, call(max_tokens=None))
        await until(lambda: "Delta 0" in client.lines)
        await manager.unload("a", "abort")
        await response
    assert client.lines[-1] == "failed server model_unloading"


@within_deadline
async def test_a_stream_that_waits_for_its_model_gets_heartbeats():
    client = Client()
    async with managed() as (manager, factory):
        factory.gate.clear()
        response = respond(manager, client, call())
        await until(lambda: client.body)
        assert (client.status, client.lines[0].split()[0]) == (200, "heartbeat")
        factory.gate.set()
        await response
    assert next(line for line in client.lines if "heartbeat" not in line) == "start 5 "


@within_deadline
async def test_a_load_that_fails_after_a_heartbeat_is_an_error_in_the_stream():
    client = Client()
    async with managed() as (manager, factory):
        factory.gate.clear()
        factory.failures.append(LoadFailed("a", "no weights"))
        response = respond(manager, client, call())
        await until(lambda: client.body)
        factory.gate.set()
        await response
    assert client.lines[-1] == "failed server load_failed"


@within_deadline
async def test_lookups_are_answered_before_the_stream_starts_and_heartbeats_cover_them():
    client = Client()
    async with managed() as (manager, factory):
        factory.gate.clear()
        encoder = LineEncoder()
        lookup = Lookup(Detokenize((1, 2)), encoder.set_echo)
        response = respond(manager, client, Call("a", [request("hello", 1)], encoder, streams=True, lookups=[lookup]))
        await until(lambda: client.body)
        factory.gate.set()
        await response
    assert next(line for line in client.lines if "heartbeat" not in line) == "start 5 answer"


@pytest.mark.parametrize("streams", [True, False])
@within_deadline
async def test_a_disconnect_cancels_a_lookup(streams):
    client = Client()
    async with managed() as (manager, factory):
        factory.gate.clear()
        lookup = Lookup(Detokenize((1, 2)), lambda text: None)
        response = respond(manager, client, call(streams=streams, lookups=[lookup]))
        await until(lambda: manager.instance("a").requests)
        client.leave()
        await response
        assert manager.instance("a").requests == 0


@within_deadline
async def test_a_disconnect_in_a_stream_closes_its_generations():
    client = Client()
    async with managed() as (manager, _):
        response = respond(manager, client, call(max_tokens=None))
        await until(lambda: "Delta 0" in client.lines)
        client.leave()
        await response
        await until(lambda: manager.instance("a").requests == 0)
