"""The server over real sockets, with scripted and tiny models: the wire, the errors, and what frees a place."""

import json
import re
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

import mlx_api_server
from tests.support.requests import send_plain
from tests.support.servers import assert_clean, clean_server
from tools.harness.running_server import DEADLINE, chat_body, eventually, run_server, running_server

HELLO = "Hello there, and hello there again."
LIMIT = 100_000  # bytes of a body


@pytest.fixture(scope="module")
def broken_path(tmp_path_factory):
    """What looks like a model and is none."""
    path = tmp_path_factory.mktemp("models") / "broken"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory, scripted_path, tiny_llama_path, broken_path):
    """Models of every kind; the endless script has a context that no test comes to the end of."""
    scripted = {"source": str(scripted_path), "type": "instruction", "context_length": 10**8, "preload": True}
    models = {
        "talker": scripted,
        "thinker": {**scripted, "type": "thinking"},
        "narrow": {**scripted, "max_running": 1, "max_waiting": 1},
        "tiny": {"source": str(tiny_llama_path), "preload": True},
        "sleeper": {"source": str(scripted_path)},
        "broken": {"source": str(broken_path)},
    }
    lines = [f"max_body_bytes = {LIMIT}", 'memory_limit = "100TB"']  # what such contexts would take if they were used
    for key, fields in models.items():
        lines += [f"[models.{key}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
    path = tmp_path_factory.mktemp("config") / "models.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def server(config):
    """One server for all tests here; it ends as cleanly as any."""
    with clean_server("--no-defaults", "--config", str(config)) as server:
        yield server


def assert_answers(server):
    assert server.get("/health").status == 200
    assert server.chat("talker", "hello").message["content"] == HELLO


def requests_of(server, key):
    model = server.model(key)
    return model["running_requests"], model["queued_requests"]


def contents(payloads, field="content"):
    return [p["choices"][0]["delta"][field] for p in payloads if p != "[DONE]" and has(p, field)]


def has(payload, field):
    return bool(payload["choices"]) and field in payload["choices"][0]["delta"]


# Whole answers


def test_a_whole_answer_has_the_openai_shape(server):
    answer = server.chat("talker", "hello")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    body = answer.json
    assert body.keys() == {
        "id", "object", "created", "model", "system_fingerprint", "choices", "usage", "timings",
    }  # fmt: skip
    assert (body["object"], body["model"], body["id"][:9]) == ("chat.completion", "talker", "chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": HELLO, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = body["usage"]
    assert usage["completion_tokens"] == 7  # six words and the end of the sequence
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_reasoning_is_apart_from_the_answer_and_counted(server):
    body = server.chat("thinker", "think").json
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "It is four.",
        "refusal": None,
        "reasoning_content": "Two and two are four.",
    }
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 7}
    assert body["usage"]["completion_tokens"] == 11


def test_a_thinking_model_may_answer_without_thinking(server):
    body = server.chat("thinker", "hello").json
    assert body["choices"][0]["message"] == {"role": "assistant", "content": HELLO, "refusal": None}
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize("parameter", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_its_limit(server, parameter):
    body = server.chat("talker", "hello", **{parameter: 3}).json
    assert body["choices"][0]["message"]["content"] == "Hello there, and"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stop", [" again", ["nowhere", "there again"], ["n."]])
def test_an_answer_ends_before_a_stop_string(server, stop):
    stops = [stop] if isinstance(stop, str) else stop
    body = server.chat("talker", "hello", stop=stop).json
    assert body["choices"][0]["message"]["content"] == HELLO[: HELLO.index(stops[-1])]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_text_parts_are_a_message(server):
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "hello"}]
    body = {"model": "talker", "messages": [{"role": "user", "content": parts}]}
    assert server.post("/v1/chat/completions", body).message["content"] == HELLO


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 7}, {"seed": 7, "top_p": 0.5, "top_k": 20}])
def test_the_same_request_has_the_same_answer_alone_and_in_company(server, settings):
    def ask(text="What is the capital of France?", **parameters):
        return server.chat("tiny", text, max_tokens=12, **parameters).message["content"]

    alone = ask(**settings)
    with ThreadPoolExecutor(8) as pool:
        company = [pool.submit(ask, f"{n} and more", temperature=1.5, seed=n) for n in range(5)]
        again = [pool.submit(ask, **settings) for _ in range(3)]
        assert [answer.result() for answer in again] == [alone] * 3
        assert all(answer.result() for answer in company)


def test_a_growing_conversation_has_its_cached_tokens_in_usage(server):
    messages = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 5}]
    first = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 5})
    messages += [{"role": "assistant", "content": first.message["content"]}, {"role": "user", "content": "And then?"}]
    second = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 5})
    cached = second.json["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first.json["usage"]["prompt_tokens"] - 1


# Streams


def test_a_stream_comes_in_order_each_token_its_own_chunk(server):
    with server.stream("thinker", "think", stream_options={"include_usage": True}) as stream:
        payloads = list(stream)
    role, *deltas, finish, usage, done = payloads
    assert role["choices"] == [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]
    assert contents(deltas, "reasoning_content") == ["Two", " and", " two", " are", " four."]
    assert contents(deltas) == ["It", " is", " four."]
    assert [has(payload, "content") for payload in deltas] == [False] * 5 + [True] * 3
    assert finish["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": 7}
    assert done == "[DONE]"
    assert {(p["id"], p["created"], p["model"], p["object"]) for p in payloads[:-1]} == {
        (role["id"], role["created"], "thinker", "chat.completion.chunk")
    }


@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
def test_a_stream_has_usage_only_where_it_is_asked_for(server, options):
    with server.stream("talker", "hello", **options) as stream:
        payloads = list(stream)
    assert contents(payloads) == ["Hello", " there,", " and", " hello", " there", " again."]
    assert not any("usage" in payload for payload in payloads)


def test_a_stream_carries_the_text_of_a_whole_answer(server):
    for model, text, parameters in (
        ("talker", "emoji", {}),
        ("talker", "hello", {"stop": "hello"}),
        ("talker", "forever", {"max_tokens": 9}),
        ("thinker", "think", {"max_tokens": 4}),
        ("tiny", "hello", {"seed": 3, "max_tokens": 20}),
    ):
        whole = server.chat(model, text, **parameters).json
        with server.stream(model, text, stream_options={"include_usage": True}, **parameters) as stream:
            *payloads, finish, usage, _ = list(stream)
        message = whole["choices"][0]["message"]
        assert "".join(contents(payloads)) == message["content"]
        assert "".join(contents(payloads, "reasoning_content")) == message.get("reasoning_content", "")
        assert finish["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_character_of_several_tokens_comes_whole(server):
    with server.stream("talker", "emoji") as stream:
        texts = contents(list(stream))
    assert "".join(texts) == "Family: 👨\u200d👩 end"
    assert not any("\ufffd" in text for text in texts)


def test_two_models_interleave_their_tokens(server):
    """Neither answer ends, and yet both go on."""
    with server.stream("talker", "forever") as one, server.stream("thinker", "forever") as other:
        for _ in range(50):
            assert len(one.read(10)) == len(other.read(10)) == 10


def test_one_reader_that_never_reads_holds_no_other_up(server):
    with server.stream("talker", "forever") as stalled:
        eventually(lambda: requests_of(server, "talker") == (1, 0))
        for _ in range(5):
            assert_answers(server)
        assert stalled.read(3)
    eventually(lambda: requests_of(server, "talker") == (0, 0))


# Leaving


def test_hanging_up_in_a_stream_frees_its_place(server):
    with server.stream("talker", "forever") as staying:
        staying.read(3)
        with server.stream("talker", "forever") as leaving:
            leaving.read(3)
            eventually(lambda: requests_of(server, "talker") == (2, 0))  # those of the test before may still leave
        eventually(lambda: requests_of(server, "talker") == (1, 0))
        assert len(staying.read(50)) == 50
    eventually(lambda: requests_of(server, "talker") == (0, 0))


def test_hanging_up_in_a_plain_request_frees_its_place(server):
    with server.stream("talker", "forever") as staying:
        staying.read(3)
        leaving = send_plain(server, "talker", "forever")
        eventually(lambda: requests_of(server, "talker") == (2, 0))
        leaving.close()
        eventually(lambda: requests_of(server, "talker") == (1, 0))
        assert len(staying.read(50)) == 50
    eventually(lambda: requests_of(server, "talker") == (0, 0))


@pytest.mark.parametrize("streams", [True, False])
def test_hanging_up_while_waiting_for_a_place_frees_it(server, streams):
    with server.stream("narrow", "forever") as running:
        running.read(3)
        connection = server.connect()
        body = chat_body("narrow", "forever", stream=streams)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        eventually(lambda: requests_of(server, "narrow") == (1, 1))
        connection.close()
        eventually(lambda: requests_of(server, "narrow") == (1, 0))
        assert len(running.read(50)) == 50
    eventually(lambda: requests_of(server, "narrow") == (0, 0))


def test_the_next_in_the_queue_gets_the_place_that_comes_free(server):
    with server.stream("narrow", "forever") as running:
        running.read(3)
        waiting = send_plain(server, "narrow", "hello")
        eventually(lambda: requests_of(server, "narrow") == (1, 1))
    answer = json.loads(waiting.getresponse().read())
    waiting.close()
    assert answer["choices"][0]["message"]["content"] == HELLO


def test_a_full_queue_is_429_with_a_time_to_try_again(server):
    with server.stream("narrow", "forever") as running:
        running.read(3)
        waiting = send_plain(server, "narrow", "forever")
        eventually(lambda: requests_of(server, "narrow") == (1, 1))
        answer = server.chat("narrow", "hello")
        assert (answer.status, answer.error["type"], answer.error["code"]) == (429, "rate_limit_error", "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        waiting.close()
    eventually(lambda: requests_of(server, "narrow") == (0, 0))


# Models


def test_every_registered_model_is_listed(server):
    eventually(lambda: requests_of(server, "talker") == (0, 0))
    body = server.get("/v1/models").json
    assert body["object"] == "list"
    listed = {model["id"]: model for model in body["data"]}
    assert {"talker", "thinker", "narrow", "tiny", "sleeper", "broken"} <= listed.keys()
    talker = listed["talker"]
    assert {name: talker[name] for name in ("object", "type", "context_length", "running_requests")} == {
        "object": "model",
        "type": "instruction",
        "context_length": 10**8,
        "running_requests": 0,
    }
    assert talker["owned_by"]
    assert isinstance(talker["created"], int)
    assert talker["memory_bytes"] > 0
    assert talker["status"] == {"value": "loaded"}
    assert server.get("/v1/models/talker").json == talker


def test_a_model_that_is_not_loaded_is_loaded_by_its_first_request(server, scripted_path):
    assert server.model("sleeper")["memory_bytes"] == 0
    assert server.status("sleeper") == "unloaded"
    assert server.chat("sleeper", "hello").message["content"] == HELLO
    assert server.status("sleeper") == "loaded"
    assert server.post("/v1/models/unload", {"key": "sleeper"}).json["status"] == "unloaded"
    assert server.status("sleeper") == "unloaded"


@pytest.mark.parametrize("key", ["copy", "org/copy"])
def test_a_model_is_loaded_at_run_time_chatted_with_and_unloaded(server, scripted_path, key):
    loaded = server.post("/v1/models/load", {"model": str(scripted_path), "key": key, "type": "instruction"})
    assert (loaded.status, loaded.json["key"], loaded.json["status"]) == (200, key, "loaded")
    assert loaded.json["load_time_seconds"] > 0
    assert loaded.json["memory_bytes"] > 0
    assert server.status(key) == "loaded"
    assert server.chat(key, "hello").message["content"] == HELLO
    unloaded = server.post("/v1/models/unload", {"key": key})
    assert unloaded.status == 200
    assert unloaded.json.keys() == {"key", "status", "completed_requests", "aborted_requests", "freed_bytes"}
    assert server.status(key) == "unloaded"


def test_loading_what_is_registered_needs_only_its_source_again(server, scripted_path):
    """What the request does not say is no contradiction."""
    answer = server.post("/v1/models/load", {"model": str(scripted_path), "key": "sleeper"})
    assert answer.status == 200
    answer = server.post("/v1/models/load", {"model": str(scripted_path), "key": "narrow"})
    assert answer.status == 200, answer.json


def test_an_unload_lets_streams_finish_ends_them_or_is_refused(server, scripted_path):
    server.post("/v1/models/load", {"model": str(scripted_path), "key": "brief", "context_length": 10**8})
    with server.stream("brief", "forever") as stream:
        stream.read(3)
        refused = server.post("/v1/models/unload", {"key": "brief", "mode": "reject"})
        assert (refused.status, refused.error["code"]) == (409, "model_busy")
        assert len(stream.read(20)) == 20
        aborted = server.post("/v1/models/unload", {"key": "brief", "mode": "abort"}).json
        assert (aborted["completed_requests"], aborted["aborted_requests"]) == (0, 1)
        *_, last = stream
        assert last["error"]["type"] == "server_error"
        assert "unloaded" in last["error"]["message"]


def test_a_drain_that_lasts_too_long_is_cut_short(server, scripted_path):
    server.post("/v1/models/load", {"model": str(scripted_path), "key": "brief", "context_length": 10**8})
    with server.stream("brief", "forever") as stream:
        stream.read(3)
        report = server.post("/v1/models/unload", {"key": "brief", "mode": "drain", "timeout": 0.05}).json
        assert report["aborted_requests"] == 1
        *_, last = stream
        assert "error" in last


# Errors

USER = [{"role": "user", "content": "hello"}]
GOOD = {"model": "talker", "messages": USER}
BAD_BODIES = {
    "nothing": (b"", None),
    "malformed JSON": (b'{"model": "talker", ', None),
    "not even text": (b"\xff\xfe\x00", None),
    "nested without end": (b"[" * 50_000, None),
    "a list": (b"[1, 2]", None),
    "a number": (b"3", None),
    "no model": ({"messages": USER}, "model"),
    "a model that is no string": ({**GOOD, "model": 5}, "model"),
    "no messages": ({"model": "talker"}, "messages"),
    "empty messages": ({**GOOD, "messages": []}, "messages"),
    "messages of a wrong type": ({**GOOD, "messages": "hello"}, "messages"),
    "a message of a wrong type": ({**GOOD, "messages": ["hello"]}, "messages[0]"),
    "unknown role": ({**GOOD, "messages": [*USER, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
    "no content": ({**GOOD, "messages": [{"role": "user"}]}, "messages[0].content"),
    "an image": (
        {**GOOD, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    "negative max_tokens": ({**GOOD, "max_tokens": -3}, "max_tokens"),
    "max_tokens zero": ({**GOOD, "max_tokens": 0}, "max_tokens"),
    "max_tokens of a wrong type": ({**GOOD, "max_tokens": "5"}, "max_tokens"),
    "temperature 3": ({**GOOD, "temperature": 3}, "temperature"),
    "temperature below zero": ({**GOOD, "temperature": -0.1}, "temperature"),
    "temperature of a wrong type": ({**GOOD, "temperature": True}, "temperature"),
    "top_p 2": ({**GOOD, "top_p": 2}, "top_p"),
    "stream of a wrong type": ({**GOOD, "stream": "yes"}, "stream"),
    "stop of a wrong type": ({**GOOD, "stop": 5}, "stop"),
    "too many answers": ({**GOOD, "n": 17}, "n"),
    "an unknown parameter": ({**GOOD, "best_of": 2}, "best_of"),
    "a bias on a token that is none": ({**GOOD, "logit_bias": {"999999999": 1}}, "logit_bias"),
    "a bias of a wrong type": ({**GOOD, "logit_bias": {"1": "much"}}, "logit_bias.1"),
}


@pytest.mark.parametrize(("body", "param"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_chat_request_is_400_and_names_its_parameter(server, body, param):
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 400, answer.body
    assert answer.error["message"]
    assert (answer.error["type"], answer.error["param"]) == ("invalid_request_error", param)
    assert_answers(server)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1e-300, "top_p": 0.9},
        {"repetition_penalty": 1e300, "top_p": 0.9},
        {"temperature": 1e-300, "top_p": 1e-300, "min_p": 1},
        {"top_k": 10**15, "seed": -(2**63)},
        {"logit_bias": dict.fromkeys(map(str, range(300)), -100), "frequency_penalty": 2},
    ],
    ids=str,
)
def test_extreme_settings_are_answered_or_refused_and_hurt_no_other_request(server, settings):
    answer = server.chat("tiny", "hello", max_tokens=5, **settings)
    assert answer.status in (200, 400), answer.body
    assert_answers(server)


def test_a_bad_request_that_wants_a_stream_has_its_status_too(server):
    for body, status in (({**GOOD, "temperature": 3}, 400), ({**GOOD, "model": "missing"}, 404)):
        assert server.post("/v1/chat/completions", {**body, "stream": True}).status == status


def test_an_unknown_model_is_404_and_the_known_ones_are_named(server):
    unknown = [
        (server.chat("missing", "hello"), "model"),
        (server.get("/v1/models/missing"), "model"),
        (server.post("/v1/models/unload", {"key": "missing"}), "key"),
    ]
    for answer, param in unknown:
        assert (answer.status, answer.error["type"]) == (404, "not_found_error")
        assert (answer.error["code"], answer.error["param"]) == ("model_not_found", param)
        assert "'missing'" in answer.error["message"]
        assert "talker, thinker" in answer.error["message"]


@pytest.mark.parametrize("streams", [True, False])
def test_a_prompt_longer_than_the_context_is_400_with_both_numbers(server, streams):
    answer = server.chat("tiny", "What is the capital of France? " * 400, stream=streams)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    context, tokens = sorted({int(number) for number in re.findall(r"\d+", answer.error["message"])})
    assert tokens > context == 2048
    assert "This model's maximum context length is 2048 tokens" in answer.error["message"]  # programs look for it
    assert_answers(server)


def test_an_answer_ends_at_the_end_of_the_context(server, scripted_path):
    server.post("/v1/models/load", {"model": str(scripted_path), "key": "short", "context_length": 100})
    body = server.chat("short", "forever", max_tokens=10**6).json
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 100


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1", 404, "not_found_error"),
        ("POST", "/v1/chat/completion", 404, "not_found_error"),
        ("GET", "/v1/chat/completions/1", 404, "not_found_error"),
        ("GET", "/v1/chat/completions", 405, "invalid_request_error"),
        ("DELETE", "/v1/models", 405, "invalid_request_error"),
        ("DELETE", "/v1/cache", 405, "invalid_request_error"),
        ("POST", "/health", 405, "invalid_request_error"),
    ],
)
def test_an_unknown_path_or_a_wrong_method_has_the_error_object(server, method, path, status, kind):
    answer = server.ask(method, path)
    assert (answer.status, answer.error["type"]) == (status, kind)
    assert path in answer.error["message"]
    assert_answers(server)


def test_a_body_that_is_too_large_is_413(server):
    body = json.dumps(chat_body("talker", "x" * LIMIT)).encode()
    declared = server.post("/v1/chat/completions", body)
    chunked = server.ask("POST", "/v1/chat/completions", iter([body[:1000], body[1000:]]))
    for answer in (declared, chunked):
        assert (answer.status, answer.error["type"]) == (413, "invalid_request_error")
        assert str(LIMIT) in answer.error["message"]
    assert_answers(server)


def test_what_is_no_http_disturbs_no_other_client(server):
    for garbage in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 9",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(garbage)
    assert_answers(server)


def test_a_body_that_is_cut_short_disturbs_no_other_client(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{"model"')
    assert_answers(server)


BAD_LOADS = {
    "nowhere": ({"model": "/no/such/place"}, 400, "invalid_source"),
    "no source": ({"model": "three/part/name/of/nothing here"}, 400, "invalid_source"),
    "unknown embedded": ({"model": "embedded:none"}, 400, "invalid_source"),
    "empty": ({"model": ""}, 400, None),
    "nothing": ({}, 400, None),
    "wrong type": ({"model": "embedded:smollm2", "type": "poet"}, 400, None),
    "wrong key": ({"model": "embedded:smollm2", "key": "a key"}, 400, None),
}


@pytest.mark.parametrize(("body", "status", "code"), BAD_LOADS.values(), ids=BAD_LOADS)
def test_a_bad_load_request_gets_the_reason(server, body, status, code):
    known = [model["id"] for model in server.get("/v1/models").json["data"]]
    answer = server.post("/v1/models/load", body)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert [model["id"] for model in server.get("/v1/models").json["data"]] == known


def test_a_model_that_can_not_be_loaded_is_503_and_forgotten(server, broken_path):
    answer = server.post("/v1/models/load", {"model": str(broken_path), "key": "new"})
    assert (answer.status, answer.error["code"]) == (503, "load_failed")
    assert "'new' could not be loaded" in answer.error["message"]
    assert server.get("/v1/models/new").status == 404


def test_a_registered_model_that_can_not_be_loaded_is_503_and_failed(server):
    for _ in range(2):
        answer = server.chat("broken", "hello", stream=True)
        assert (answer.status, answer.error["code"]) == (503, "load_failed")
    status = server.model("broken")["status"]
    assert status["value"] == "failed"
    assert "could not be loaded" in status["error"]
    assert requests_of(server, "broken") == (0, 0)
    assert_answers(server)


def test_a_key_that_is_taken_by_another_source_is_409(server, tiny_llama_path):
    answer = server.post("/v1/models/load", {"model": str(tiny_llama_path), "key": "talker"})
    assert (answer.status, answer.error["code"]) == (409, "model_exists")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "key"),
        ({"key": 5}, "key"),
        ({"key": "talker", "mode": "now"}, "mode"),
        ({"key": "x", "timeout": -1}, "timeout"),
    ],
)
def test_a_bad_unload_request_is_400_and_names_its_parameter(server, body, param):
    answer = server.post("/v1/models/unload", body)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_bad_requests_leave_running_streams_alone(server):
    with server.stream("talker", "forever") as stream:
        stream.read(3)
        for body, _ in list(BAD_BODIES.values())[:8]:
            server.post("/v1/chat/completions", body)
        server.chat("missing", "hello")
        assert set(contents(stream.read(30))) == {"tick ", "tock "}


# The process


@pytest.fixture
def flags(scripted_path):
    return ("--no-defaults", "--model", f"talker={scripted_path}", "--shutdown-timeout", "1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_server_cleanly(flags, number):
    with running_server(*flags) as server:
        assert server.chat("talker", "hello").message["content"] == HELLO
        assert_clean(server.stop(number))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_with_running_streams_cleanly(flags, number):
    with running_server(*flags) as server, ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        server.post("/v1/models/unload", {"key": "talker"})
        streams = [stack.enter_context(server.stream("talker", "forever")) for _ in range(3)]
        reading = [pool.submit(list, stream) for stream in streams]  # one that is not read is cut off in the end
        plain = send_plain(server, "talker", "forever")
        eventually(lambda: requests_of(server, "talker") == (4, 0))
        assert_clean(server.stop(number))
        for payloads in (each.result(DEADLINE) for each in reading):
            assert "[DONE]" not in payloads
            assert not any(p["choices"][0]["finish_reason"] for p in payloads if "choices" in p)
        plain.close()


def test_a_stream_that_ends_in_time_is_finished_before_the_server_ends(scripted_path):
    flags = ("--no-defaults", "--model", f"talker={scripted_path}")
    with running_server(*flags) as server, server.stream("talker", "forever", max_tokens=1500) as stream:
        stream.read(3)
        ending = threading.Thread(target=lambda: assert_clean(server.stop()))
        ending.start()
        *_, finish, done = stream
        assert (finish["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        ending.join(DEADLINE)


def test_a_signal_ends_a_server_that_loads_a_model_cleanly():
    """Its progress says that it loads: whoever asks for that may come when the load has ended."""
    with running_server("--no-defaults", "--shutdown-timeout", "1") as server:
        connection = server.connect()
        body = {"model": "embedded:smollm2", "key": "slow", "stream": True}
        connection.request("POST", "/v1/models/load", json.dumps(body))
        assert b"progress" in connection.getresponse().readline()
        assert_clean(server.stop(signal.SIGINT))
        connection.close()


def test_the_greeting_names_the_models_and_a_command_that_works(flags):
    with running_server(*flags) as server:
        lines = []
        for line in server.process.stdout:
            lines.append(line)
            if "curl" in line:
                break
        assert any("talker" in line and "unloaded" in line for line in lines)
        body = re.search(r"-d '(.*)'", lines[-1]).group(1)
        assert f"curl -s {server.url}/v1/chat/completions" in lines[-1]
        assert server.post("/v1/chat/completions", body.encode()).status == 200


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (("--port", "70000"), "70000"),
        (("--model", "nameless"), "nameless"),
        (("--nonsense",), "--nonsense"),
        (("--config", "/no/such/file.toml"), "/no/such/file.toml"),
        (("--log-level", "loud"), "loud"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(wrong, named, monkeypatch, capsys):
    """In this process, which has imported all of it already."""
    monkeypatch.setattr(sys, "argv", ["mlx_api_server.py", *wrong])
    status, printed = mlx_api_server.main(), capsys.readouterr()
    assert (status, printed.out, len(printed.err.splitlines())) == (2, "", 1)
    assert named in printed.err


def test_a_model_that_is_nowhere_is_one_line_and_status_2():
    ended = run_server("--model", "x=/no/such/place")
    assert (ended.status, len(ended.stderr.splitlines())) == (2, 1)
    assert "/no/such/place" in ended.stderr
