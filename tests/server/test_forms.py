"""Engine events in, the wire's answer out: a stream and a whole answer say the same, in OpenAI's shapes."""

import json
from itertools import groupby

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mlxserver.api.schemas import ChatCompletionRequest, CompletionRequest, parse
from mlxserver.api.sse import SSEDecoder
from mlxserver.engine.events import Delta, Finish, Timings, TokenLogprob, ToolCallDelta, Usage
from mlxserver.server.chat import ChatForm
from mlxserver.server.completions import TextForm
from tests.support.published import check

USAGE = Usage(10, 5, 2, 4, Timings(0.1, 0.2, 0.3))


def chat_form(**parameters):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **parameters}
    return ChatForm(parse(ChatCompletionRequest, orjson.dumps(body)), "reasoning_content")


def text_form(*echoes, prompt="x", **parameters):
    body = {"model": "m", "prompt": prompt, **parameters}
    return TextForm(parse(CompletionRequest, orjson.dumps(body)), echoes)


def token(text, logprob=-0.5, *top):
    return TokenLogprob(text, text.encode(), logprob, tuple(TokenLogprob(t, t.encode(), p) for t, p in top))


def chunks(form, events, shape="ChatCompletionChunk"):
    """What a stream of these events carries."""
    sent = form.opening(USAGE.prompt_tokens) + b"".join(form.chunk(event, event.index) for event in events)
    payloads = [json.loads(payload) for payload in SSEDecoder().feed(sent + form.closing(USAGE))]
    return [check(payload, shape) for payload in payloads]


def by_choice(events, count):
    return [[event for event in events if event.index == index] for index in range(count)]


def whole(form, events, count=1):
    return form.whole(by_choice(events, count), USAGE)


def deltas(payloads):
    return [choice["delta"] for payload in payloads for choice in payload["choices"]]


THINKING = [Delta("17 +", "reasoning"), Delta(" 25", "reasoning"), Delta("4"), Delta("2"), Finish("stop")]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_has_a_field_of_its_own(field):
    asked = {"reasoning_format": field}
    assert deltas(chunks(chat_form(**asked), THINKING)) == [
        {"role": "assistant"},
        {field: "17 +"},
        {field: " 25"},
        {"content": "4"},
        {"content": "2"},
        {},
    ]
    message = check(whole(chat_form(**asked), THINKING), "ChatCompletion")["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "42", "refusal": None, field: "17 + 25"}


def test_reasoning_is_inline_where_that_is_asked_for():
    inline = "<think>\n17 + 25\n</think>\n\n42"
    message = whole(chat_form(reasoning_format="inline"), THINKING)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": inline, "refusal": None}
    said = deltas(chunks(chat_form(reasoning_format="inline"), THINKING))
    assert "".join(delta.get("content", "") for delta in said) == inline
    assert not any("reasoning_content" in delta for delta in said)


def test_inline_reasoning_that_is_cut_short_stays_open():
    events = [Delta("17", "reasoning"), Finish("length")]
    assert whole(chat_form(reasoning_format="inline"), events)["choices"][0]["message"]["content"] == "<think>\n17"


def test_the_server_says_where_reasoning_goes_and_the_request_wins():
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    for parameters, field in (({}, "reasoning"), ({"reasoning_format": "reasoning_content"}, "reasoning_content")):
        request = parse(ChatCompletionRequest, orjson.dumps(body | parameters))
        assert field in whole(ChatForm(request, "reasoning"), THINKING)["choices"][0]["message"]


CALLS = [
    Delta("Let me add."),
    ToolCallDelta(0, "", "call_1", "add"),
    ToolCallDelta(0, '{"a": 1'),
    ToolCallDelta(0, "}"),
    ToolCallDelta(1, "{}", "call_2", "stop"),
    Finish("tool_calls"),
]


def test_tool_calls_are_whole_in_a_whole_answer():
    choice = check(whole(chat_form(), CALLS), "ChatCompletion")["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me add."
    assert choice["message"]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "call_2", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
    ]
    assert whole(chat_form(), CALLS[1:])["choices"][0]["message"]["content"] is None


def test_tool_calls_come_in_pieces_in_a_stream():
    said = [delta["tool_calls"][0] for delta in deltas(chunks(chat_form(), CALLS)) if "tool_calls" in delta]
    assert said == [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a": 1'}},
        {"index": 0, "function": {"arguments": "}"}},
        {"index": 1, "id": "call_2", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
    ]


def test_logprobs_are_told_where_they_are_asked_for():
    events = [Delta("é!", logprobs=(token("é", -0.25, ("é", -0.25), ("e", -float("inf"))), token("!")))]
    events.append(Finish("stop"))
    told = [
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
    answer = whole(chat_form(**asked), events)
    assert answer["choices"][0]["logprobs"] == {"content": told, "refusal": None}
    assert ChatCompletion.model_validate_json(orjson.dumps(answer)).choices[0].logprobs.content[0].bytes == [195, 169]
    streamed = chunks(chat_form(**asked), events)
    assert [c["choices"][0].get("logprobs") for c in streamed] == [None, {"content": told, "refusal": None}, None]
    ChatCompletionChunk.model_validate(streamed[1])
    assert whole(chat_form(), events)["choices"][0]["logprobs"] is None


def test_every_choice_has_its_own_index():
    events = [Delta("a", index=0), Delta("b", index=1), Finish("stop", 1), Finish("length", 0)]
    payloads = chunks(chat_form(n=2), events)
    assert [p["choices"][0]["index"] for p in payloads] == [0, 1, 0, 1, 1, 0]
    choices = whole(chat_form(n=2), events, 2)["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in choices] == [
        (0, "a", "length"),
        (1, "b", "stop"),
    ]


def test_usage_has_timings_beside_it():
    answer = whole(chat_form(), THINKING)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert (answer["timings"]["queue_ms"], answer["timings"]["predicted_ms"]) == (100.0, 300.0)
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    last = chunks(chat_form(**asked), THINKING)[-1]
    assert (last["choices"], last["usage"], last["timings"]) == ([], answer["usage"], answer["timings"])


def test_continuous_usage_counts_the_pieces_and_is_exact_at_the_end():
    payloads = chunks(chat_form(stream=True, stream_options={"continuous_usage_stats": True}), THINKING)
    assert [p["usage"]["completion_tokens"] for p in payloads] == [0, 1, 2, 3, 4, 4, 5]
    assert {p["usage"]["prompt_tokens"] for p in payloads} == {10}


def test_a_bare_completion_is_text():
    events = [Delta("Par"), Delta("is"), Finish("length")]
    answer = check(whole(text_form(), events), "Completion")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"text": "Paris", "index": 0, "logprobs": None, "finish_reason": "length"}]
    payloads = chunks(text_form(), events, "CompletionChunk")
    assert [p["choices"][0]["text"] for p in payloads] == ["Par", "is", ""]


def test_echoed_prompts_begin_each_of_their_choices():
    events = [Delta(text, index=n) for n, text in enumerate("abcd")] + [Finish("stop", n) for n in range(4)]
    asked = {"prompt": ["x", "y"], "echo": True, "n": 2}
    texts = ["xa", "xb", "yc", "yd"]
    assert [c["text"] for c in whole(text_form("x", "y", **asked), events, 4)["choices"]] == texts
    said = ["", "", "", ""]
    for payload in chunks(text_form("x", "y", **asked), events, "CompletionChunk"):
        said[payload["choices"][0]["index"]] += payload["choices"][0]["text"]
    assert said == texts


def test_bare_logprobs_have_the_older_shape():
    events = [Delta("Par", logprobs=(token("Par", -0.5, ("Q", -0.25)),)), Delta("is", logprobs=(token("is"),))]
    events.append(Finish("stop"))
    told = {
        "tokens": ["Par", "is"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"Q": -0.25, "Par": -0.5}, {"is": -0.5}],
        "text_offset": [0, 3],
    }
    assert check(whole(text_form(logprobs=1), events), "Completion")["choices"][0]["logprobs"] == told
    streamed = [c["choices"][0]["logprobs"] for c in chunks(text_form(logprobs=1), events, "CompletionChunk")]
    assert [part["text_offset"] for part in streamed if part] == [[0], [3]]


def test_bare_tokens_that_are_no_text_are_named_by_their_bytes():
    halves = [TokenLogprob("\ufffd", raw, -0.5) for raw in (b"\xc3", b"\xa9")]
    events = [Delta("é!", logprobs=(*halves, token("!"))), Finish("stop")]
    told = whole(text_form(logprobs=0), events)["choices"][0]["logprobs"]
    assert told["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert told["text_offset"] == [0, 0, 1]


PIECES = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["content", "reasoning", "call"]), st.text(max_size=3)), max_size=12
)


def events_of(pieces):
    """As an engine would tell them: of each choice first the reasoning, then the content, then the calls."""
    order = ["reasoning", "content", "call"]
    events = []
    for index, kind, text in sorted(pieces, key=lambda piece: order.index(piece[1])):
        event = Delta(text, kind, index) if kind != "call" else ToolCallDelta(0, text, "call_1", "f", index)
        events.append(event)
    return [*events, Finish("stop", 1), Finish("length", 0)]


@given(PIECES, st.sampled_from(["reasoning_content", "reasoning", "inline"]))
def test_a_stream_says_what_a_whole_answer_says(pieces, reasoning_format):
    asked, events = {"n": 2, "reasoning_format": reasoning_format}, events_of(pieces)
    choices = check(whole(chat_form(**asked), events, 2), "ChatCompletion")["choices"]
    told = sorted((c for p in chunks(chat_form(**asked), events) for c in p["choices"]), key=lambda c: c["index"])
    for index, parts in groupby(told, key=lambda choice: choice["index"]):
        parts = list(parts)
        message = choices[index]["message"]
        for field in ("content", "reasoning_content", "reasoning"):
            said = "".join(part["delta"].get(field, "") for part in parts)
            assert said == (message.get(field) or "")
        calls = [call["function"]["arguments"] for part in parts for call in part["delta"].get("tool_calls", ())]
        assert "".join(calls) == "".join(call["function"]["arguments"] for call in message.get("tool_calls", ()))
        assert parts[-1]["finish_reason"] == choices[index]["finish_reason"]
