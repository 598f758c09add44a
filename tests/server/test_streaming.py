"""The response to a call, over a scripted engine and a dialect of lines: streaming knows no dialect of the wire."""

import asyncio
from dataclasses import replace
from itertools import cycle

import pytest

from mlxserver.api.dialect import Call, Lookup
from mlxserver.api.native.load import LoadEvents
from mlxserver.engine.errors import LoadFailed, PromptRejected
from mlxserver.engine.requests import Detokenize, JsonFormat
from mlxserver.server.event_stream import DIRECT, EventStream
from mlxserver.server.load_events import LoadResponse
from mlxserver.server.streaming import GenerationResponse
from tests.support.managed import answered, managed, specs
from tests.support.scripted_engine import DEADLINE, request, until, within_deadline

BRIEF = 0.001  # seconds between two heartbeats


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
        return f"heartbeat {progress}\n".encode()

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


class DirectClient(Client):
    """A client that is also written to directly, at those times that `reads` has; it begins again at its end."""

    def __init__(self, reads):
        super().__init__()
        self._reads, self.direct = cycle(reads), []

    def can_write(self):
        return self.status == 200 and next(self._reads)

    def write_part(self, part):
        self.direct.append(part)
        self.body += part


def call(text="hello", max_tokens=2, **fields):
    return Call("a", [request(text, max_tokens)], LineEncoder(), **{"streams": True, **fields})


def respond(manager, client, call, headers=(), interval=0.0):
    response = GenerationResponse(
        manager.instance("a"), call, dict(headers), max_unread=1000, heartbeat_interval=interval
    )
    extensions = {DIRECT: {"writer": client}} if isinstance(client, DirectClient) else {}
    return asyncio.create_task(response({"type": "http", "extensions": extensions}, client.receive, client.send))


@within_deadline
async def test_a_stream_is_what_its_encoder_makes_of_the_events():
    client = Client()
    async with managed() as (manager, _):
        await respond(manager, client, call(), {"x-ignored-parameters": "b"})
    assert client.status == 200
    assert client.headers == {"content-type": "text/plain", "cache-control": "no-cache", "x-ignored-parameters": "b"}
    assert client.lines == ["start 5 ", "Delta 0", "Delta 0", "Finish 0", "end 2"]


@pytest.mark.parametrize("reads", [[True], [True, False], [False, False, True], [False]])
@within_deadline
async def test_a_stream_is_the_same_whatever_goes_directly_to_the_connection(reads):
    client = DirectClient(reads)
    async with managed() as (manager, _):
        await respond(manager, client, call(max_tokens=20))
    assert client.lines == ["start 5 ", *["Delta 0"] * 20, "Finish 0", "end 20"]


@within_deadline
async def test_events_of_a_stream_go_directly_to_a_client_that_reads():
    client = DirectClient([True])
    async with managed() as (manager, _):
        responding = respond(manager, client, call(max_tokens=None))
        await until(lambda: len(client.direct) > 3)
        client.leave()
        await responding


class BrokenEncoder(LineEncoder):
    def event(self, event, choice):
        raise ValueError(event)


@within_deadline
async def test_an_encoder_that_fails_fails_in_its_own_response_and_no_other_stream_notices():
    broken, client = DirectClient([True]), DirectClient([True])
    async with managed() as (manager, _):
        failing = respond(manager, broken, replace(call(max_tokens=20), encoder=BrokenEncoder()))
        await respond(manager, client, call(max_tokens=20))
        with pytest.raises(ValueError, match="Delta"):
            await failing
    assert client.lines[-1] == "end 20"


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
        response = respond(manager, client, call(), interval=BRIEF)
        await until(lambda: client.body)
        assert (client.status, client.lines[0].split("(")[0]) == (200, "heartbeat Progress")
        factory.gate.set()
        await response
    assert next(line for line in client.lines if "heartbeat" not in line) == "start 5 "


@within_deadline
async def test_a_load_that_fails_after_a_heartbeat_is_an_error_in_the_stream():
    client = Client()
    async with managed() as (manager, factory):
        factory.gate.clear()
        factory.failures.append(LoadFailed("a", "no weights"))
        response = respond(manager, client, call(), interval=BRIEF)
        await until(lambda: client.body)
        factory.gate.set()
        await response
    assert client.lines[-1] == "failed server load_failed"


@within_deadline
async def test_a_stream_that_waits_for_a_slot_gets_heartbeats_with_its_position():
    clients = [Client(), Client(), Client()]
    async with managed() as (manager, factory):
        await answered(manager, "a")
        factory.batch.slots = 1
        responses = []
        for client in clients:
            responses.append(respond(manager, client, call(max_tokens=None), interval=BRIEF))
            await until(lambda client=client: client.body)
        await until(lambda: "heartbeat QueuePosition(position=1)" in clients[1].lines)
        await until(lambda: "heartbeat QueuePosition(position=2)" in clients[2].lines)
        clients[0].leave()
        await until(lambda: "Delta 0" in clients[1].lines)
        await until(lambda: clients[2].lines[-1] == "heartbeat QueuePosition(position=1)")
        for client in clients:
            client.leave()
        await asyncio.gather(*responses)
    for client in clients[:2]:
        assert not any("position" in line for line in client.lines[client.lines.index("Delta 0") :])


@within_deadline
async def test_a_stream_whose_prompt_is_rendered_gets_heartbeats():
    client = Client()
    async with managed() as (manager, factory):
        await answered(manager, "a")
        factory.runners[-1].formatting.clear()
        asked = replace(request("hello", 1), format=JsonFormat())
        response = respond(manager, client, Call("a", [asked], LineEncoder(), streams=True), interval=BRIEF)
        await until(lambda: "heartbeat None" in client.lines)
        factory.runners[-1].formatting.set()
        await response
    assert client.lines[-1] == "end 1"


@within_deadline
async def test_a_stream_gets_heartbeats_between_its_events_too():
    client = Client()
    async with managed() as (manager, factory):
        response = respond(manager, client, call(max_tokens=None), interval=BRIEF)
        await until(lambda: "Delta 0" in client.lines)
        factory.batch.gate.clear()  # as while text is held back, or a step takes long
        await until(lambda: client.lines[-3:] == ["heartbeat None"] * 3)
        factory.batch.gate.set()
        await until(lambda: client.lines[-1] == "Delta 0")
        client.leave()
        await response


@within_deadline
async def test_what_fails_after_a_heartbeat_is_an_error_in_the_stream():
    client = Client()
    async with managed() as (manager, factory):
        await answered(manager, "a")
        factory.runners[-1].formatting.clear()
        asked = replace(request("refuse", 1), format=JsonFormat())
        response = respond(manager, client, Call("a", [asked], LineEncoder(), streams=True), interval=BRIEF)
        await until(lambda: client.body)
        factory.runners[-1].formatting.set()
        await response
    assert (client.status, client.lines[-1]) == (200, "failed invalid_request None")


@within_deadline
async def test_what_fails_before_a_heartbeat_has_its_status():
    client = Client()
    async with managed() as (manager, _):
        with pytest.raises(PromptRejected):
            await respond(manager, client, call("refuse"), interval=DEADLINE)
    assert client.status is None


@within_deadline
async def test_a_streamed_load_gets_heartbeats_between_its_steps():
    client = Client()
    async with managed() as (manager, factory):
        factory.gate.clear()
        factory.reports = False
        response = LoadResponse(lambda report: manager.load(specs("a")[0], on_progress=report), BRIEF, LoadEvents())
        loading = asyncio.create_task(response({"type": "http", "path": "/"}, client.receive, client.send))
        await until(lambda: client.body.count(b": keep-alive\n\n") > 2)
        factory.gate.set()
        await loading
    assert (client.status, client.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert b'"event":"loaded"' in client.lines[-2].encode()


@within_deadline
async def test_a_client_that_does_not_read_gets_no_heartbeats():
    parts, may_send = [], asyncio.Event()

    async def send(message):
        parts.append(message)
        await may_send.wait()

    beats = asyncio.Semaphore(0)
    async with EventStream(send, {}, BRIEF, lambda: beats.release() or b"beat") as stream:
        writing = asyncio.create_task(stream.start())
        await until(lambda: parts)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(beats.acquire(), 20 * BRIEF)
        may_send.set()
        await writing
        await beats.acquire()
        await stream.end(b"last")
    assert [part.get("body") for part in parts][-1] == b"last"


@within_deadline
async def test_lookups_are_answered_before_the_stream_starts_and_heartbeats_cover_them():
    client = Client()
    async with managed() as (manager, factory):
        factory.gate.clear()
        encoder = LineEncoder()
        lookup = Lookup(Detokenize((1, 2)), encoder.set_echo)
        asked = Call("a", [request("hello", 1)], encoder, streams=True, lookups=[lookup])
        response = respond(manager, client, asked, interval=BRIEF)
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
