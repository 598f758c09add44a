"""What the server answers is what OpenAI's own types take."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from protocol import responses
from protocol.sse import SSEDecoder

CHUNKS = responses.ChunkEncoder("chatcmpl-1", 'a "model"', 1700000000)
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": 'a "model"'}


def read(event):
    (payload,) = SSEDecoder().feed(event)
    ChatCompletionChunk.model_validate_json(payload, strict=True)
    return json.loads(payload)


@pytest.mark.parametrize(
    ("event", "choice"),
    [
        (CHUNKS.role(), {"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}),
        (CHUNKS.content("Paris"), {"index": 0, "delta": {"content": "Paris"}, "finish_reason": None}),
        (CHUNKS.reasoning("Hm", 1), {"index": 1, "delta": {"reasoning_content": "Hm"}, "finish_reason": None}),
        (CHUNKS.finish("length", 2), {"index": 2, "delta": {}, "finish_reason": "length"}),
    ],
)
def test_a_chunk_is_one_choice(event, choice):
    assert read(event) == {**HEAD, "choices": [choice]}


def test_the_usage_chunk_has_no_choice():
    usage = responses.usage(3, 4, reasoning_tokens=2, cached_tokens=1)
    assert read(CHUNKS.usage(usage)) == {**HEAD, "choices": [], "usage": usage}


@given(st.text())
def test_any_text_arrives_as_it_was(text):
    assert read(CHUNKS.content(text))["choices"][0]["delta"]["content"] == text


def test_usage_adds_up():
    assert responses.usage(3, 4, reasoning_tokens=2, cached_tokens=1) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }


def test_a_completion_is_openais():
    choices = [responses.choice("42", "stop", reasoning="17 + 25")]
    whole = responses.completion(responses.completion_id(), "m", 1700000000, choices, responses.usage(1, 2))
    read = ChatCompletion.model_validate_json(orjson.dumps(whole))
    assert read.to_dict() == whole
    assert (read.choices[0].message.content, read.choices[0].message.reasoning_content) == ("42", "17 + 25")


def test_no_reasoning_is_no_field():
    assert responses.choice("42", "stop")["message"] == {"role": "assistant", "content": "42"}


def test_ids_are_new_each_time():
    assert responses.completion_id() != responses.completion_id()


def test_a_model_is_openais_with_its_state_beside():
    model = responses.model("m", created=1, status="loaded", source="embedded:m", type="thinking", running=2)
    assert Model.model_validate(model, strict=True).id == "m"
    assert (model["status"], model["running_requests"]) == ({"value": "loaded"}, 2)
    assert responses.model_list([model]) == {"object": "list", "data": [model]}


def test_a_failed_model_says_why():
    model = responses.model("m", created=1, status="failed", source="x", failure="no such file")
    assert model["status"] == {"value": "failed", "error": "no such file"}


def test_an_error_has_all_four_fields():
    assert responses.error("No.", "invalid_request_error", param="messages") == {
        "error": {"message": "No.", "type": "invalid_request_error", "param": "messages", "code": None}
    }


def test_an_error_about_an_undecodable_name_can_be_sent():
    assert b"caf" in orjson.dumps(responses.error("caf\udce9", "server_error"))
