"""ChatClient and a scripted server over a real socket: typed events and typed errors."""

import asyncio
import json
import socket
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.client.api import ChatClient
from mlxserver.client.errors import (
    ApiError,
    ClientError,
    NotSupported,
    ServerSilent,
    ServerUnreachable,
    SettingInvalid,
    StreamBroken,
    api_error,
)
from mlxserver.client.events import ChunkReader, Content, Finished, Reasoning, ToolCall, Usage, read_answer
from mlxserver.client.models import ModelCard, Progress, read_card
from mlxserver.client.stats import timing
from mlxserver.client.transport import normalise_url
from tests.support.scripted_server import scripted_server

ASKED = [{"role": "user", "content": "What is the capital of France?"}]
USAGE = Usage(prompt_tokens=5, completion_tokens=4, reasoning_tokens=1, cached_tokens=2)


@pytest.fixture(scope="module")
def server():
    with scripted_server() as server:
        yield server


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def using(url, act, **settings):
    """Run `act` with a client of the server at `url`; its result."""

    async def use():
        async with ChatClient(url, **settings) as client:
            return await act(client)

    return asyncio.run(use())


def streamed(url, model, *, events=None, **settings):
    """The events of one stream, without their times; `events` keeps those that came before an error."""
    events = [] if events is None else events

    async def read(client):
        async with aclosing(client.stream(ASKED, model)) as stream:
            async for event in stream:
                events.append(event)

    using(url, read, **settings)
    return untimed(events)


def untimed(events):
    fields = [{n: getattr(e, n) for n in e.__dataclass_fields__ if n != "at"} for e in events]
    return [type(event)(**kept) for event, kept in zip(events, fields, strict=True)]


def test_a_stream_gives_content_as_it_comes_and_ends_with_usage(server):
    assert streamed(server.url, "talker") == [
        Content("The capital"),
        Content(" is "),
        Content("Paris."),
        Finished("stop", USAGE),
    ]


def test_a_stream_asks_for_usage_and_sends_only_parameters_that_have_a_value(server):
    async def read(client):
        return [event async for event in client.stream(ASKED, "talker", temperature=0, max_tokens=None)]

    using(server.url, read)
    assert server.requests[-1] == {
        "model": "talker",
        "messages": ASKED,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    }


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("thinker", [Reasoning("17 + 25"), Reasoning(" is 42"), Content("42"), Content("\n\n")]),
        ("other-thinker", [Reasoning("hm"), Content("42")]),
        ("waiter", [Content("The capital"), Content(" is "), Content("Paris.")]),
        ("caller", [ToolCall(0, "call_1", "add", '{"a"'), ToolCall(0, "call_1", "", ": 1}")]),
    ],
)
def test_reasoning_under_both_names_comments_and_tool_calls_are_parsed(server, model, expected):
    assert streamed(server.url, model)[:-1] == expected


STEPS = [Progress("reading", 1_000_000, 4_000_000), Progress("warming up")]


def test_a_stream_reports_the_progress_of_the_load_that_it_waits_for(server):
    server.gate.set()
    reported = []

    async def read(client):
        async with aclosing(client.stream(ASKED, "loader", on_progress=reported.append)) as stream:
            return [event async for event in stream]

    assert untimed(using(server.url, read)) == streamed(server.url, "loader") == streamed(server.url, "talker")
    assert reported == STEPS


def test_the_progress_of_a_load_is_no_token_of_a_recording(server):
    server.gate.set()
    recorded = using(server.url, lambda client: client.prepare(ASKED, "loader")())
    assert untimed(recorded.events()) == streamed(server.url, "talker")
    talker = using(server.url, lambda client: client.prepare(ASKED, "talker")())
    counts = [len(timing(each.start, each.events()).arrivals) for each in (recorded, talker)]
    assert counts[0] == counts[1] > 0


def test_a_stream_without_usage_and_done_is_complete_once_it_has_a_finish_reason(server):
    assert streamed(server.url, "brief") == [Content("Yes"), Finished("stop", None)]


def test_events_carry_the_time_of_their_arrival(server):
    events = []
    streamed(server.url, "talker", events=events)
    times = [event.at for event in events]
    assert times == sorted(times)
    assert times[0] > 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("breaker", "The answer broke off: The engine stopped."),
        ("early-leaver", "The answer broke off: the stream ended without a finish_reason."),
    ],
)
def test_a_broken_answer_raises_after_the_events_before_the_break(server, model, message):
    events = []
    with pytest.raises(StreamBroken) as caught:
        streamed(server.url, model, events=events)
    assert str(caught.value).startswith(message)
    assert untimed(events) == [Content("The cap")]


def test_a_connection_that_is_cut_breaks_the_answer_off(server):
    with pytest.raises(StreamBroken, match="the connection was lost"):
        streamed(server.url, "cutter")


@pytest.mark.parametrize("model", ["babbler", "page"])
def test_a_stream_that_is_no_event_stream_of_json_is_broken(server, model):
    with pytest.raises(StreamBroken, match="expected"):
        streamed(server.url, model)


def test_closing_a_stream_closes_its_connection(server):
    server.left.clear()

    async def read_one(client):
        async with aclosing(client.stream(ASKED, "hanger")) as stream:
            return await anext(stream)

    assert using(server.url, read_one).text == "For"
    assert server.left.wait(60)


def test_a_silent_stream_is_broken_after_the_read_timeout(server):
    with pytest.raises(StreamBroken, match="silent for 0.7 s"):
        streamed(server.url, "hanger", read_timeout=0.7)


def test_a_server_that_is_silent_for_the_read_timeout_is_still_at_work(server):
    with pytest.raises(ServerSilent, match=r"is still at work; it has sent nothing for 0.7 s.*--timeout"):
        streamed(server.url, "mute", read_timeout=0.7)


def test_a_server_that_answers_nothing_at_all_is_not_called_at_work():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(ServerSilent, match="does not answer other requests either"):
            using(url, lambda client: client.complete(ASKED, "m"), read_timeout=0.7)


def test_a_whole_answer_has_content_reasoning_calls_and_usage(server):
    answer = using(server.url, lambda client: client.complete(ASKED, "thinker"))
    assert (answer.content, answer.reasoning, answer.finished.usage) == ("42", "17 + 25 is 42", USAGE)
    answer = using(server.url, lambda client: client.complete(ASKED, "caller"))
    assert untimed(answer.tool_calls) == [ToolCall(0, "call_1", "add", '{"a": 1}')]
    assert answer.content == ""


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("unknown", 404, "Model 'unknown' does not exist. Known models: sleeper, talker."),
        ("gateway", 502, "HTTP 502 (Bad Gateway): <html> <h1>Bad Gateway</h1>"),
        ("string-error", 400, "an error as a string"),
    ],
)
def test_an_error_of_any_shape_is_an_api_error(server, model, status, message):
    for ask in (lambda: streamed(server.url, model), lambda: using(server.url, lambda c: c.complete(ASKED, model))):
        with pytest.raises(ApiError) as caught:
            ask()
        assert (caught.value.status, str(caught.value)) == (status, message)


def test_an_api_error_has_the_fields_of_openais_error_object(server):
    with pytest.raises(ApiError) as caught:
        streamed(server.url, "unknown")
    assert (caught.value.type, caught.value.param, caught.value.code) == ("not_found_error", "model", "model_not_found")


def test_a_page_in_place_of_json_is_an_api_error(server):
    with pytest.raises(ApiError, match="HTTP 200"):
        using(server.url, lambda client: client.complete(ASKED, "page"))


def test_models_are_listed_with_their_known_fields(server):
    sleeper, talker = using(server.url, ChatClient.models)
    assert (sleeper.key, sleeper.state, sleeper.context_length, sleeper.running) == ("sleeper", "unloaded", None, None)
    assert talker == ModelCard("talker", "loaded", "instruction", "org/talker", 8192, 540_000_000, 1, 2)
    assert using(server.url, lambda client: client.model("talker")) == talker


def test_a_key_with_slashes_dots_and_blanks_reaches_the_server_whole(server):
    for key in ("org/name", "..", "a b?c#d", "100%"):
        with pytest.raises(ApiError, match="does not exist") as caught:
            using(server.url, lambda client, key=key: client.model(key))
        assert f"'{key}'" in str(caught.value)


def test_a_model_card_of_another_server_is_just_a_key():
    card = read_card({"id": "gpt", "object": "model", "created": 1, "owned_by": "them"})
    assert card == ModelCard("gpt")
    assert card.fields["owned_by"] == "them"


def test_load_and_unload_return_their_results(server):
    loaded = using(server.url, lambda client: client.load("org/new", "new", context_length=512))
    assert (loaded.key, loaded.seconds) == ("new", 1.25)
    assert server.requests[-1] == {"model": "org/new", "key": "new", "context_length": 512}
    unloaded = using(server.url, lambda client: client.unload("talker", timeout=2))
    assert (unloaded.completed, unloaded.aborted, unloaded.freed_bytes) == (3, 0, 540_000_000)
    assert server.requests[-1] == {"key": "talker", "mode": "drain", "timeout": 2}


def test_load_and_unload_raise_not_supported_on_a_server_without_them():
    with scripted_server(has_extensions=False) as server:
        for act in (lambda client: client.load("org/new"), lambda client: client.unload("talker")):
            with pytest.raises(NotSupported, match="does not support /models/"):
                using(server.url, act)


def test_an_unknown_model_is_not_a_missing_endpoint(server):
    with pytest.raises(ApiError, match="'unknown' does not exist") as caught:
        using(server.url, lambda client: client.unload("unknown"))
    assert not isinstance(caught.value, NotSupported)


def test_the_api_key_is_sent_and_may_come_from_the_environment(monkeypatch):
    with scripted_server(api_key="secret") as server:
        assert using(server.url, ChatClient.models, api_key="secret")
        with pytest.raises(ApiError, match="Incorrect API key"):
            using(server.url, ChatClient.models)
        monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert using(None, ChatClient.models)


def test_a_port_without_a_server_is_unreachable():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerUnreachable) as caught:
            using(url, ChatClient.models)
    assert str(caught.value).startswith(f"No answer from a server at {url}/v1: Connection refused. Start one with `")


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        (" http://localhost:8000/v1/ ", "http://localhost:8000/v1"),
        ("https://example.com/v1beta/openai", "https://example.com/v1beta/openai"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_a_base_url_may_have_v1_or_not(given_url, url):
    assert normalise_url(given_url) == url


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a", "http://", "http://a:99999", "http://a:x", "http://[", "x"]
)
def test_an_invalid_base_url_is_refused_by_value(url):
    with pytest.raises(SettingInvalid) as caught:
        ChatClient(url)
    assert str(caught.value) == f"base_url: {url!r} is not valid; expected a URL such as http://127.0.0.1:8000/v1."


def test_an_api_key_that_cannot_be_a_header_is_refused_without_being_shown():
    with pytest.raises(SettingInvalid) as caught:
        ChatClient("http://a", "sec\r\nret")
    assert "sec" not in str(caught.value)


WIRE_NAMES = (
    *("choices", "delta", "message", "content", "reasoning", "tool_calls", "function", "index", "finish_reason"),
    *("usage", "completion_tokens_details", "error", "id", "status", "memory_bytes"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WIRE_NAMES), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_any_json_of_a_server_is_events_or_a_client_error(value):
    reader = ChunkReader()
    for read in (
        lambda: reader.read(json.dumps(value), 0.0),
        lambda: reader.finish(0.0),
        lambda: read_answer(value if isinstance(value, dict) else {}, 0.0),
    ):
        try:
            read()
        except ClientError as error:
            assert str(error)
    assert str(api_error(500, json.dumps(value)))
    if isinstance(value, dict):
        assert isinstance(read_card(value).key, str)


@given(st.integers(100, 999), st.text())
def test_any_body_of_an_error_is_an_api_error(status, body):
    error = api_error(status, body)
    assert error.status == status
    assert str(error)
