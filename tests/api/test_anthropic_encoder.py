"""Anthropic's encoder: engine events in, events of a stream or a whole message out, with the same content."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.api.anthropic.encoder import MessageEncoder
from mlxserver.api.anthropic.errors import envelope
from mlxserver.api.dialect import Failure
from mlxserver.api.model_status import Progress
from mlxserver.engine.events import Delta, Finish, ToolCallDelta, Usage
from mlxserver.engine.requests import NO_LIMIT
from tests.support.anthropic_types import checked_error, checked_events, checked_message

USAGE = Usage(10, 5, 2, 4)


def encoder(token_limit=None):
    return MessageEncoder("m", token_limit=token_limit)


def streamed(events, usage=USAGE, **parameters):
    made = encoder(**parameters)
    sent = made.heartbeat(Progress("reading", 1, 2)) + made.start(10)
    return checked_events(sent + b"".join(made.event(event, 0) for event in events) + made.end(usage))


def whole(events, usage=USAGE, **parameters):
    return checked_message(json.loads(encoder(**parameters).complete([events], usage)))


def put_together(sent):
    """The content that the deltas of a stream add up to."""
    blocks = []
    for event in sent:
        if event.type == "content_block_start":
            blocks.append(event.content_block.model_dump(exclude_none=True))
        elif event.type == "content_block_delta":
            assert event.index == len(blocks) - 1
            delta = event.delta.model_dump()
            field = delta.pop("type").removesuffix("_delta").replace("input_json", "input")
            (value,) = delta.values()
            blocks[-1][field] = (blocks[-1][field] or "") + value
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"] or "{}")
    return blocks


CALLS = [
    ToolCallDelta(0, "", "call_1", "add"),
    ToolCallDelta(0, '{"a"'),
    ToolCallDelta(0, ": 1}"),
    ToolCallDelta(1, "", "call_2", "now"),
]
KINDS = st.sampled_from(["content", "reasoning"])


@given(st.lists(st.builds(Delta, st.text(min_size=1), KINDS), max_size=8), st.booleans())
def test_a_stream_and_a_whole_message_have_the_same_content(deltas, has_calls):
    events = [*deltas, *(CALLS if has_calls else ()), Finish("tool_calls" if has_calls else "stop")]
    message = whole(events)
    assert put_together(streamed(events)) == [block.model_dump(exclude_none=True) for block in message.content]
    assert message.stop_reason == ("tool_use" if has_calls else "end_turn")


def test_each_call_is_a_block():
    events = [Delta("I add.", "content"), *CALLS, Finish("tool_calls")]
    assert [block.model_dump(exclude_none=True) for block in whole(events).content] == [
        {"type": "text", "text": "I add."},
        {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "toolu_2", "name": "now", "input": {}},
    ]


def test_a_call_that_was_cut_has_its_text_as_input():
    events = [*CALLS[:2], Finish("length")]
    assert whole(events, token_limit=5).content[0].input == {"arguments": '{"a"'}


@pytest.mark.parametrize(
    ("finish", "limit", "expected"),
    [
        (Finish("stop"), None, ("end_turn", None)),
        (Finish("stop", stop="END"), None, ("stop_sequence", "END")),
        (Finish("tool_calls"), None, ("tool_use", None)),
        (Finish("length"), 5, ("max_tokens", None)),
        (Finish("length"), 6, ("model_context_window_exceeded", None)),
        (Finish("length"), NO_LIMIT, ("model_context_window_exceeded", None)),
        (Finish("length"), None, ("max_tokens", None)),
    ],
)
def test_the_reason_of_the_end(finish, limit, expected):
    message = whole([Delta("x"), finish], token_limit=limit)
    delta = streamed([Delta("x"), finish], token_limit=limit)[-2].delta
    assert (message.stop_reason, message.stop_sequence) == (delta.stop_reason, delta.stop_sequence) == expected


def test_cached_tokens_are_counted_apart():
    usage = whole([Finish("stop")]).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (6, 4, 0)
    assert (usage.output_tokens, usage.output_tokens_details.thinking_tokens) == (5, 2)


def test_a_failure_is_the_last_event():
    failed = encoder().failed(Failure("No.", "server", request_id="r"))
    assert failed.startswith(b"event: error\ndata: ")
    body = json.loads(failed.partition(b"data: ")[2])
    assert (checked_error(body).type, body["request_id"]) == ("api_error", "r")


@pytest.mark.parametrize(
    ("failure", "type_", "message"),
    [
        (Failure("No.", "invalid_request", "tools[0]"), "invalid_request_error", "tools[0]: No."),
        (Failure("'tools' is wrong.", "invalid_request", "tools"), "invalid_request_error", "'tools' is wrong."),
        (Failure("No.", "invalid_request", "prompt.conversation"), "invalid_request_error", "messages: No."),
        (Failure("No.", "rate_limit"), "rate_limit_error", "No."),
        (Failure("No.", "server", code="overloaded"), "overloaded_error", "No."),
        (Failure("caf\udce9", "server"), "api_error", "caf\\udce9"),
    ],
)
def test_an_error_names_its_parameter_in_its_message(failure, type_, message):
    error = checked_error(json.loads(envelope(failure)))
    assert (error.type, error.message) == (type_, message)
