"""OpenAI's encoders: engine events in, chunks or a whole answer out, with the same text, of the published schemas."""

import json
from itertools import groupby

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mlxserver.api.openai.chat import ChatDialect
from mlxserver.api.openai.completions import CompletionDialect
from mlxserver.api.sse import SSEDecoder
from mlxserver.config.settings import Settings
from mlxserver.engine.events import (
    Delta,
    Finish,
    PromptLogprobs,
    PromptToken,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from tests.support.published import check

USAGE = Usage(10, 5, 2, 4, Timings(0.1, 0.2, 0.3))


SETTINGS = Settings()
PROMPT_TOP = PromptToken(8, "Q", b"Q", -0.25, 1)


def chat_encoder(settings=SETTINGS, **parameters):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **parameters}
    return ChatDialect(settings).parse(orjson.dumps(body)).encoder


def completion_encoder(prompt="x", **parameters):
    body = {"model": "m", "prompt": prompt, **parameters}
    return CompletionDialect(SETTINGS).parse(orjson.dumps(body)).encoder


def token(text, logprob=-0.5, *top):
    return TokenLogprob(text, text.encode(), logprob, tuple(TokenLogprob(t, t.encode(), p) for t, p in top))


def chunks(encoder, events, schema="ChatCompletionChunk"):
    """The chunks of a stream of these events."""
    sent = encoder.start(USAGE.prompt_tokens) + b"".join(encoder.event(event, event.index) for event in events)
    *payloads, done = SSEDecoder().feed(sent + encoder.end(USAGE))
    assert done == "[DONE]"
    return [check(json.loads(payload), schema) for payload in payloads]


def by_choice(events, count):
    return [[event for event in events if event.index == index] for index in range(count)]


def complete(encoder, events, count=1):
    return json.loads(encoder.complete(by_choice(events, count), USAGE))


def deltas(payloads):
    return [choice["delta"] for payload in payloads for choice in payload["choices"]]


THINKING = [Delta("17 +", "reasoning"), Delta(" 25", "reasoning"), Delta("4"), Delta("2"), Finish("stop")]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_has_a_field_of_its_own(field):
    asked = {"reasoning_format": field}
    assert deltas(chunks(chat_encoder(**asked), THINKING)) == [
        {"role": "assistant"},
        {field: "17 +"},
        {field: " 25"},
        {"content": "4"},
        {"content": "2"},
        {},
    ]
    message = check(complete(chat_encoder(**asked), THINKING), "ChatCompletion")["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "42", "refusal": None, field: "17 + 25"}


def test_reasoning_is_inline_where_that_is_asked_for():
    inline = "<think>\n17 + 25\n</think>\n\n42"
    message = complete(chat_encoder(reasoning_format="inline"), THINKING)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": inline, "refusal": None}
    sent = deltas(chunks(chat_encoder(reasoning_format="inline"), THINKING))
    assert "".join(delta.get("content", "") for delta in sent) == inline
    assert not any("reasoning_content" in delta for delta in sent)


def test_inline_reasoning_that_is_cut_short_stays_open():
    events = [Delta("17", "reasoning"), Finish("length")]
    assert (
        complete(chat_encoder(reasoning_format="inline"), events)["choices"][0]["message"]["content"] == "<think>\n17"
    )


def test_the_reasoning_format_of_the_settings_holds_unless_the_request_has_one():
    settings = Settings(reasoning_format="reasoning")
    for parameters, field in (({}, "reasoning"), ({"reasoning_format": "reasoning_content"}, "reasoning_content")):
        assert field in complete(chat_encoder(settings, **parameters), THINKING)["choices"][0]["message"]


CALLS = [
    Delta("Let me add."),
    ToolCallDelta(0, "", "call_1", "add"),
    ToolCallDelta(0, '{"a": 1'),
    ToolCallDelta(0, "}"),
    ToolCallDelta(1, "{}", "call_2", "stop"),
    Finish("tool_calls"),
]


def test_tool_calls_are_whole_in_a_whole_answer():
    choice = check(complete(chat_encoder(), CALLS), "ChatCompletion")["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me add."
    assert choice["message"]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "call_2", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
    ]
    assert complete(chat_encoder(), CALLS[1:])["choices"][0]["message"]["content"] is None


def test_tool_calls_are_deltas_in_a_stream():
    sent = [delta["tool_calls"][0] for delta in deltas(chunks(chat_encoder(), CALLS)) if "tool_calls" in delta]
    assert sent == [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a": 1'}},
        {"index": 0, "function": {"arguments": "}"}},
        {"index": 1, "id": "call_2", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
    ]


def test_logprobs_are_in_answers_that_ask_for_them():
    events = [Delta("é!", logprobs=(token("é", -0.25, ("é", -0.25), ("e", -float("inf"))), token("!")))]
    events.append(Finish("stop"))
    expected = [
        {
            "token": "é",
            "bytes": [0xC3, 0xA9],
            "logprob": -0.25,
            "top_logprobs": [
                {"token": "é", "bytes": [0xC3, 0xA9], "logprob": -0.25},
                {"token": "e", "bytes": [101], "logprob": -9999.0},
            ],
        },
        {"token": "!", "bytes": [33], "logprob": -0.5, "top_logprobs": []},
    ]
    asked = {"logprobs": True, "top_logprobs": 2}
    answer = complete(chat_encoder(**asked), events)
    assert answer["choices"][0]["logprobs"] == {"content": expected, "refusal": None}
    assert ChatCompletion.model_validate_json(orjson.dumps(answer)).choices[0].logprobs.content[0].bytes == [195, 169]
    streamed = chunks(chat_encoder(**asked), events)
    assert [c["choices"][0].get("logprobs") for c in streamed] == [None, {"content": expected, "refusal": None}, None]
    ChatCompletionChunk.model_validate(streamed[1])
    assert complete(chat_encoder(), events)["choices"][0]["logprobs"] is None


def test_every_choice_has_its_own_index():
    events = [Delta("a", index=0), Delta("b", index=1), Finish("stop", 1), Finish("length", 0)]
    payloads = chunks(chat_encoder(n=2), events)
    assert [p["choices"][0]["index"] for p in payloads] == [0, 1, 0, 1, 1, 0]
    choices = complete(chat_encoder(n=2), events, 2)["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in choices] == [
        (0, "a", "length"),
        (1, "b", "stop"),
    ]


def test_timings_are_beside_usage():
    answer = complete(chat_encoder(), THINKING)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert (answer["timings"]["queue_ms"], answer["timings"]["predicted_ms"]) == (100.0, 300.0)
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    last = chunks(chat_encoder(**asked), THINKING)[-1]
    assert (last["choices"], last["usage"], last["timings"]) == ([], answer["usage"], answer["timings"])


def test_continuous_usage_counts_deltas_and_is_exact_at_the_end():
    payloads = chunks(chat_encoder(stream=True, stream_options={"continuous_usage_stats": True}), THINKING)
    assert [p["usage"]["completion_tokens"] for p in payloads] == [0, 1, 2, 3, 4, 4, 5]
    assert {p["usage"]["prompt_tokens"] for p in payloads} == {10}


def test_a_bare_completion_is_text():
    events = [Delta("Par"), Delta("is"), Finish("length")]
    answer = check(complete(completion_encoder(), events), "Completion")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"text": "Paris", "index": 0, "logprobs": None, "finish_reason": "length"}]
    payloads = chunks(completion_encoder(), events, "CompletionChunk")
    assert [p["choices"][0]["text"] for p in payloads] == ["Par", "is", ""]


def test_echoed_prompts_begin_each_of_their_choices():
    events = [Delta(text, index=n) for n, text in enumerate("abcd")] + [Finish("stop", n) for n in range(4)]
    asked = {"prompt": ["x", "y"], "echo": True, "n": 2}
    texts = ["xa", "xb", "yc", "yd"]
    assert [c["text"] for c in complete(completion_encoder(**asked), events, 4)["choices"]] == texts
    sent = ["", "", "", ""]
    for payload in chunks(completion_encoder(**asked), events, "CompletionChunk"):
        sent[payload["choices"][0]["index"]] += payload["choices"][0]["text"]
    assert sent == texts


def test_bare_logprobs_have_the_older_shape():
    events = [Delta("Par", logprobs=(token("Par", -0.5, ("Q", -0.25)),)), Delta("is", logprobs=(token("is"),))]
    events.append(Finish("stop"))
    expected = {
        "tokens": ["Par", "is"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"Q": -0.25, "Par": -0.5}, {"is": -0.5}],
        "text_offset": [0, 3],
    }
    assert check(complete(completion_encoder(logprobs=1), events), "Completion")["choices"][0]["logprobs"] == expected
    streamed = [c["choices"][0]["logprobs"] for c in chunks(completion_encoder(logprobs=1), events, "CompletionChunk")]
    assert [part["text_offset"] for part in streamed if part] == [[0], [3]]


def test_an_echo_with_logprobs_has_those_of_the_prompt():
    """Also where the tokens have a beginning of sequence that the text has not."""
    first, second = PromptToken(1, "<s>", b"<s>"), PromptToken(7, "Hé", "Hé".encode(), -1.5, 3, (PROMPT_TOP,))
    events = [PromptLogprobs((first, second)), Delta("is", logprobs=(token("is"),)), Finish("stop")]
    expected = {
        "tokens": ["<s>", "Hé", "is"],
        "token_logprobs": [None, -1.5, -0.5],
        "top_logprobs": [None, {"Q": -0.25, "Hé": -1.5}, {"is": -0.5}],
        "text_offset": [0, 0, 2],
    }
    asked = {"prompt": "Hé", "echo": True, "logprobs": 1}
    choice = check(complete(completion_encoder(**asked), events), "Completion")["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("Héis", expected)
    streamed = [c["choices"][0] for c in chunks(completion_encoder(**asked), events, "CompletionChunk")]
    assert [part["text"] for part in streamed] == ["Hé", "is", ""]
    parts = [part["logprobs"] for part in streamed if part["logprobs"]]
    assert {name: [item for part in parts for item in part[name]] for name in expected} == expected


def test_prompt_logprobs_have_vllms_shape():
    tokens = (PromptToken(1, "<s>", b"<s>"), PromptToken(7, "H", b"H", -1.5, 3, (PROMPT_TOP, PROMPT_TOP)))
    events = [PromptLogprobs(tokens), Delta("is"), Finish("stop")]
    own, best = (
        {"logprob": -1.5, "rank": 3, "decoded_token": "H"},
        {"logprob": -0.25, "rank": 1, "decoded_token": "Q"},
    )
    bare = check(complete(completion_encoder(prompt_logprobs=1), events), "Completion")
    assert bare["choices"][0]["prompt_logprobs"] == [None, {"7": own, "8": best}]
    chat = check(complete(chat_encoder(prompt_logprobs=0), events), "ChatCompletion")
    assert chat["prompt_logprobs"] == [None, {"7": own}]


def test_bare_tokens_that_are_no_text_are_named_by_their_bytes():
    halves = [TokenLogprob("\ufffd", raw, -0.5) for raw in (b"\xc3", b"\xa9")]
    events = [Delta("é!", logprobs=(*halves, token("!"))), Finish("stop")]
    expected = complete(completion_encoder(logprobs=0), events)["choices"][0]["logprobs"]
    assert expected["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert expected["text_offset"] == [0, 0, 1]


DELTAS = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["content", "reasoning", "call"]), st.text(max_size=3)), max_size=12
)


def events_of(deltas):
    """In an engine's order: of each choice first the reasoning, then the content, then the calls."""
    order = ["reasoning", "content", "call"]
    events = []
    for index, kind, text in sorted(deltas, key=lambda delta: order.index(delta[1])):
        event = Delta(text, kind, index) if kind != "call" else ToolCallDelta(0, text, "call_1", "f", index)
        events.append(event)
    return [*events, Finish("stop", 1), Finish("length", 0)]


@given(DELTAS, st.sampled_from(["reasoning_content", "reasoning", "inline"]))
def test_a_stream_carries_the_text_of_a_whole_answer(drawn, reasoning_format):
    asked, events = {"n": 2, "reasoning_format": reasoning_format}, events_of(drawn)
    choices = check(complete(chat_encoder(**asked), events, 2), "ChatCompletion")["choices"]
    sent = sorted((c for p in chunks(chat_encoder(**asked), events) for c in p["choices"]), key=lambda c: c["index"])
    for index, parts in groupby(sent, key=lambda choice: choice["index"]):
        parts = list(parts)
        message = choices[index]["message"]
        for field in ("content", "reasoning_content", "reasoning"):
            text = "".join(part["delta"].get(field, "") for part in parts)
            assert text == (message.get(field) or "")
        calls = [call["function"]["arguments"] for part in parts for call in part["delta"].get("tool_calls", ())]
        assert "".join(calls) == "".join(call["function"]["arguments"] for call in message.get("tool_calls", ()))
        assert parts[-1]["finish_reason"] == choices[index]["finish_reason"]
