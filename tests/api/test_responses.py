"""What the server answers is what OpenAI's own types take, and what the published shapes say."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mlxserver.api import model_responses, responses
from mlxserver.api.openai.chunks import ChatChunkEncoder, TextChunkEncoder
from mlxserver.api.sse import SSEDecoder
from tests.support.published import check

HEAD = responses.head("chatcmpl-1", "chat.completion.chunk", 'a "model"', 1700000000, "mlx-1")
TEXT_HEAD = responses.head("cmpl-1", "text_completion", "m", 1700000000, "mlx-1")
CHUNKS = ChatChunkEncoder(HEAD)
TEXTS = TextChunkEncoder(TEXT_HEAD)
USAGE = responses.usage(3, 4, reasoning_tokens=2, cached_tokens=1)
TIMINGS = responses.timings(
    prompt_tokens=10, completion_tokens=4, cached_tokens=2, queue_seconds=0.5, prompt_seconds=2, generation_seconds=0.1
)
LOGPROB = responses.token_logprob("P", b"P", -0.5, [responses.token_logprob("Q", b"Q", -1.5)])


def payload(event):
    (data,) = SSEDecoder().feed(event)
    return json.loads(data)


def read(event):
    chunk = payload(event)
    ChatCompletionChunk.model_validate(chunk, strict=False)
    return check(chunk, "ChatCompletionChunk")


@pytest.mark.parametrize(
    ("event", "choice"),
    [
        (CHUNKS.role(), {"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}),
        (CHUNKS.content("Paris"), {"index": 0, "delta": {"content": "Paris"}, "finish_reason": None}),
        (CHUNKS.reasoning("Hm", 1), {"index": 1, "delta": {"reasoning_content": "Hm"}, "finish_reason": None}),
        (CHUNKS.reasoning("Hm", 1, "reasoning"), {"index": 1, "delta": {"reasoning": "Hm"}, "finish_reason": None}),
        (CHUNKS.finish("length", 2), {"index": 2, "delta": {}, "finish_reason": "length"}),
        (
            CHUNKS.content("P", 1, [LOGPROB]),
            {
                "index": 1,
                "delta": {"content": "P"},
                "logprobs": {"content": [LOGPROB], "refusal": None},
                "finish_reason": None,
            },
        ),
        (
            CHUNKS.tool_call(1, "{", id="call_1", name="add"),
            {
                "index": 0,
                "delta": {
                    "tool_calls": [
                        {
                            "index": 1,
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "add", "arguments": "{"},
                        }
                    ]
                },
                "finish_reason": None,
            },
        ),
        (
            CHUNKS.tool_call(1, "}", 3),
            {
                "index": 3,
                "delta": {"tool_calls": [{"index": 1, "function": {"arguments": "}"}}]},
                "finish_reason": None,
            },
        ),
    ],
)
def test_a_chunk_is_one_choice(event, choice):
    assert read(event) == {**HEAD, "choices": [choice]}


def test_the_usage_chunk_has_no_choice():
    assert read(CHUNKS.usage(USAGE, TIMINGS)) == {**HEAD, "choices": [], "usage": USAGE, "timings": TIMINGS}


def test_a_stream_that_counts_has_usage_in_every_chunk():
    chunks = ChatChunkEncoder(HEAD)
    chunks.count(responses.usage(3, 1))
    assert read(chunks.content("x"))["usage"]["completion_tokens"] == 1
    chunks.count(responses.usage(3, 2))
    assert read(chunks.finish("stop"))["usage"]["completion_tokens"] == 2


@given(st.text())
def test_any_text_arrives_as_it_was(text):
    assert read(CHUNKS.content(text))["choices"][0]["delta"]["content"] == text
    assert payload(TEXTS.text(text))["choices"][0]["text"] == text


def test_a_chunk_of_bare_text_is_openais():
    told = responses.text_logprobs(["Pa", "ris"], [-0.5, -0.1], [{"Pa": -0.5, "Q": -2.0}, {}], [7, 9])
    for event in (TEXTS.text("Paris"), TEXTS.text("Paris", 1, told), TEXTS.finish("stop", 1)):
        check(payload(event), "CompletionChunk")
    assert payload(TEXTS.text("Paris", 1, told))["choices"] == [
        {"index": 1, "text": "Paris", "logprobs": told, "finish_reason": None}
    ]


def test_usage_adds_up():
    assert USAGE == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }


def test_timings_are_named_as_llama_cpp_names_them():
    assert TIMINGS == {
        "queue_ms": 500.0,
        "cache_n": 2,
        "prompt_n": 8,
        "prompt_ms": 2000.0,
        "prompt_per_token_ms": 250.0,
        "prompt_per_second": 4.0,
        "predicted_n": 4,
        "predicted_ms": 100.0,
        "predicted_per_token_ms": 25.0,
        "predicted_per_second": 40.0,
    }


def test_what_took_no_time_has_no_rate():
    still = {"queue_seconds": 0.0, "prompt_seconds": 0.0, "generation_seconds": 0.0}
    timings = responses.timings(prompt_tokens=1, completion_tokens=0, cached_tokens=1, **still)
    assert timings["prompt_per_second"] == timings["predicted_per_token_ms"] == 0.0


def test_a_chat_completion_is_openais():
    call = responses.tool_call("call_1", "add", "{}")
    choices = [
        responses.chat_choice("42", "stop", reasoning={"reasoning_content": "17 + 25"}, logprobs=[LOGPROB]),
        responses.chat_choice("", "tool_calls", index=1, tool_calls=[call]),
    ]
    head = {**HEAD, "object": "chat.completion"}
    whole = check(responses.completion(head, choices, USAGE, TIMINGS), "ChatCompletion")
    read = ChatCompletion.model_validate_json(orjson.dumps(whole))
    assert read.to_dict() == whole
    assert (read.choices[0].message.content, read.choices[0].message.reasoning_content) == ("42", "17 + 25")
    assert (read.choices[1].message.content, read.choices[1].message.tool_calls[0].function.name) == (None, "add")


def test_a_bare_completion_is_openais():
    told = responses.text_logprobs(["P"], [-0.5], [{"P": -0.5}], [0])
    whole = responses.completion(TEXT_HEAD, [responses.text_choice("P", "stop", logprobs=told)], USAGE, TIMINGS)
    assert Completion.model_validate(check(whole, "Completion"), strict=True).to_dict() == whole


def test_no_reasoning_is_no_field():
    message = responses.chat_choice("42", "stop")["message"]
    assert message == {"role": "assistant", "content": "42", "refusal": None}


def test_ids_are_new_each_time():
    assert responses.completion_id() != responses.completion_id()


def test_a_model_is_openais_with_its_state_beside():
    model = model_responses.model(
        "m", created=1, status="loaded", source="embedded:m", type="thinking", capabilities={"chat"}, running=2
    )
    assert Model.model_validate(model, strict=True).id == "m"
    assert (model["status"], model["running_requests"]) == ({"value": "loaded"}, 2)
    assert [name for name, can in model["capabilities"].items() if can] == ["chat"]
    check(model_responses.model_list([model]), "ModelList")


def test_a_failed_model_says_why():
    model = model_responses.model("m", created=1, status="failed", source="x", failure="no such file")
    assert check(model, "Model")["status"] == {"value": "failed", "error": "no such file"}


def test_loads_and_unloads_are_of_their_shape():
    check(model_responses.loaded("m", load_time_seconds=1.5, memory_bytes=3, reserved_bytes=4, estimate=None), "Loaded")
    check(model_responses.unloaded("m", completed=1, aborted=0, freed_bytes=3), "Unloaded")
    check(responses.tokens((1, 2), 100), "Tokens")
    check(responses.prompt("x"), "Prompt")


def test_an_error_has_all_four_fields():
    assert check(responses.error("No.", "invalid_request_error", param="messages"), "Error") == {
        "error": {"message": "No.", "type": "invalid_request_error", "param": "messages", "code": None}
    }


def test_an_error_about_an_undecodable_name_can_be_sent():
    assert b"caf" in orjson.dumps(responses.error("caf\udce9", "server_error"))
