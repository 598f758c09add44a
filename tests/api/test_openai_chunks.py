"""Chunks of OpenAI's streams: what OpenAI's own types take, and of the published schemas."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mlxserver.api.dialect import Failure
from mlxserver.api.model_status import Progress
from mlxserver.api.openai.chat import ChatDialect
from mlxserver.api.openai.completions import CompletionDialect
from mlxserver.api.sse import SSEDecoder
from mlxserver.config.settings import Settings
from mlxserver.engine.events import (
    Delta,
    Finish,
    PrefillProgress,
    QueuePosition,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from tests.support.published import check

USAGE = Usage(3, 4, 2, 1, Timings(0.5, 2, 0.1))
TOKEN = TokenLogprob("P", b"P", -0.5, (TokenLogprob("Q", b"Q", -1.5),))
LOGPROB = {
    "token": "P",
    "bytes": [80],
    "logprob": -0.5,
    "top_logprobs": [{"token": "Q", "bytes": [81], "logprob": -1.5}],
}


def chat_encoder(**parameters):
    body = {"model": 'a "model"', "messages": [{"role": "user", "content": "x"}], **parameters}
    return ChatDialect(Settings()).parse(orjson.dumps(body)).encoder


def completion_encoder(**parameters):
    return CompletionDialect(Settings()).parse(orjson.dumps({"model": "m", "prompt": "x", **parameters})).encoder


CHAT = chat_encoder(n=4)
COMPLETION = completion_encoder(n=4)


def payloads(sent):
    return [json.loads(payload) for payload in SSEDecoder().feed(sent) if payload != "[DONE]"]


def payload(sent):
    (only,) = payloads(sent)
    return only


def read(sent):
    chunk = payload(sent)
    ChatCompletionChunk.model_validate(chunk, strict=False)
    return check(chunk, "ChatCompletionChunk")


HEAD = {name: value for name, value in payloads(CHAT.start(3))[0].items() if name != "choices"}
TOOL_CALL = {"index": 1, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{"}}


def test_a_chunk_begins_with_what_all_chunks_share():
    assert list(HEAD) == ["id", "object", "created", "model", "system_fingerprint"]
    assert (HEAD["object"], HEAD["model"], HEAD["id"][:9]) == ("chat.completion.chunk", 'a "model"', "chatcmpl-")
    assert payload(COMPLETION.event(Delta("x"), 0))["id"].startswith("cmpl-")


def test_a_stream_starts_with_the_role_of_each_choice():
    assert [chunk["choices"] for chunk in payloads(CHAT.start(3))] == [
        [{"index": index, "delta": {"role": "assistant"}, "finish_reason": None}] for index in range(4)
    ]


@pytest.mark.parametrize(
    ("parameters", "event", "index", "choice"),
    [
        ({}, Delta("Paris"), 0, {"delta": {"content": "Paris"}, "finish_reason": None}),
        ({}, Delta("Hm", "reasoning"), 1, {"delta": {"reasoning_content": "Hm"}, "finish_reason": None}),
        (
            {"reasoning_format": "reasoning"},
            Delta("Hm", "reasoning"),
            1,
            {"delta": {"reasoning": "Hm"}, "finish_reason": None},
        ),
        ({}, Finish("length"), 2, {"delta": {}, "finish_reason": "length"}),
        (
            {"logprobs": True, "top_logprobs": 1},
            Delta("P", logprobs=(TOKEN,)),
            1,
            {"delta": {"content": "P"}, "logprobs": {"content": [LOGPROB], "refusal": None}, "finish_reason": None},
        ),
        ({}, ToolCallDelta(1, "{", "call_1", "add"), 0, {"delta": {"tool_calls": [TOOL_CALL]}, "finish_reason": None}),
        (
            {},
            ToolCallDelta(1, "}"),
            3,
            {"delta": {"tool_calls": [{"index": 1, "function": {"arguments": "}"}}]}, "finish_reason": None},
        ),
    ],
)
def test_a_chunk_is_one_choice(parameters, event, index, choice):
    encoder = chat_encoder(**parameters)
    chunk = read(encoder.event(event, index))
    assert chunk == {**HEAD, "id": chunk["id"], "created": chunk["created"], "choices": [{"index": index, **choice}]}


def test_the_usage_chunk_has_no_choice_and_comes_before_done():
    encoder = chat_encoder(stream=True, stream_options={"include_usage": True})
    sent = encoder.end(USAGE)
    complete = json.loads(encoder.complete([], USAGE))
    chunk = read(sent)
    assert (chunk["choices"], chunk["usage"], chunk["timings"]) == ([], complete["usage"], complete["timings"])
    assert list(chunk) == [*HEAD, "choices", "usage", "timings"]
    assert SSEDecoder().feed(sent)[-1] == "[DONE]"
    assert CHAT.end(USAGE) == b"data: [DONE]\n\n"


def test_a_stream_that_counts_has_usage_in_every_chunk():
    encoder = chat_encoder(stream=True, stream_options={"continuous_usage_stats": True})
    encoder.start(3)
    assert read(encoder.event(Delta("x"), 0))["usage"]["completion_tokens"] == 1
    assert read(encoder.event(Delta("y"), 0))["usage"]["completion_tokens"] == 2
    assert read(encoder.event(Finish("stop"), 0))["usage"]["completion_tokens"] == 2


@given(st.text())
def test_any_text_arrives_as_it_was(text):
    assert read(CHAT.event(Delta(text), 0))["choices"][0]["delta"]["content"] == text
    assert payload(COMPLETION.event(Delta(text), 0))["choices"][0]["text"] == text


def test_a_chunk_of_bare_text_is_openais():
    encoder = completion_encoder(logprobs=1)
    encoder.event(Delta("Hello, "), 1)
    tokens = (TokenLogprob("Pa", b"Pa", -0.5, (TokenLogprob("Q", b"Q", -2.0),)), TokenLogprob("ris", b"ris", -0.1))
    expected = {
        "tokens": ["Pa", "ris"],
        "token_logprobs": [-0.5, -0.1],
        "top_logprobs": [{"Q": -2.0, "Pa": -0.5}, {"ris": -0.1}],
        "text_offset": [7, 9],
    }
    with_logprobs = encoder.event(Delta("Paris", logprobs=tokens), 1)
    for sent in (COMPLETION.event(Delta("Paris"), 0), with_logprobs, COMPLETION.event(Finish("stop"), 1)):
        check(payload(sent), "CompletionChunk")
    assert payload(with_logprobs)["choices"] == [
        {"index": 1, "text": "Paris", "logprobs": expected, "finish_reason": None}
    ]


def test_a_failure_is_the_last_event_of_a_stream_and_no_done_follows():
    (only,) = SSEDecoder().feed(CHAT.failed(Failure("No.", "server", code="step_failed")))
    assert check(json.loads(only), "Error")["error"] == {
        "message": "No.",
        "type": "server_error",
        "param": None,
        "code": "step_failed",
    }


def test_a_heartbeat_is_a_comment_with_the_progress_of_what_the_stream_waits_for():
    comments = []
    decoder = SSEDecoder(comments.append)
    waits = [Progress("reading", 1, 4), QueuePosition(3), PrefillProgress(512, 60_000), None]
    assert decoder.feed(b"".join(map(CHAT.heartbeat, waits))) == []
    assert comments == [
        'loading {"stage":"reading","done":1,"total":4}',
        'queue {"position":3}',
        'prefill {"done":512,"total":60000}',
        "keep-alive",
    ]


def test_a_chat_completion_is_openais():
    encoder = chat_encoder(n=2, logprobs=True, top_logprobs=1)
    events = [
        [Delta("17 + 25", "reasoning"), Delta("42", logprobs=(TOKEN,)), Finish("stop")],
        [ToolCallDelta(0, "{}", "call_1", "add"), Finish("tool_calls")],
    ]
    body = encoder.complete(events, USAGE)
    complete = check(json.loads(body), "ChatCompletion")
    read = ChatCompletion.model_validate_json(body)
    assert read.to_dict() == complete
    assert (read.choices[0].message.content, read.choices[0].message.reasoning_content) == ("42", "17 + 25")
    assert (read.choices[1].message.content, read.choices[1].message.tool_calls[0].function.name) == (None, "add")
    assert complete["choices"][0]["logprobs"] == {"content": [LOGPROB], "refusal": None}


def test_a_bare_completion_is_openais():
    body = completion_encoder(logprobs=1).complete([[Delta("P", logprobs=(TOKEN,)), Finish("stop")]], USAGE)
    complete = check(json.loads(body), "Completion")
    assert Completion.model_validate(complete, strict=True).to_dict() == complete


def test_no_reasoning_is_no_field():
    complete = json.loads(chat_encoder().complete([[Delta("42"), Finish("stop")]], USAGE))
    assert complete["choices"][0]["message"] == {"role": "assistant", "content": "42", "refusal": None}


def test_ids_are_new_each_time():
    ids = {json.loads(chat_encoder().complete([], USAGE))["id"] for _ in range(10)}
    assert len(ids) == 10
