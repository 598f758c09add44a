"""Requests for responses as they are read, the text of custom tools, and the store."""

import json
import typing

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import response_create_params

from mlxserver.api.dialect import Failure
from mlxserver.api.openai.responses.custom_input import CustomInput
from mlxserver.api.openai.responses.dialect import ResponsesDialect
from mlxserver.api.openai.responses.item_list import item_page
from mlxserver.api.openai.responses.request import ResponseRequest
from mlxserver.api.openai.responses.store import ResponseNotFound, ResponseStore
from mlxserver.api.schema.parameters import ValidationFailed, parse
from mlxserver.config.settings import Settings
from mlxserver.engine.conversation import Message, Reasoning, Text, ToolCall, ToolResult
from mlxserver.engine.events import Delta, Finish, PrefillProgress, ToolCallDelta, Usage
from mlxserver.engine.requests import NO_LIMIT, JsonFormat, ToolChoice
from tests.support.published import check

ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}
PLAY = {"type": "custom", "name": "play", "description": "Plays."}


def call(settings=None, **fields):
    return ResponsesDialect(settings or Settings()).parse(orjson.dumps({"model": "m", "input": "x", **fields}))


def request(**fields):
    return call(**fields).requests[0]


def conversation(*items, **fields):
    return [(message.role, message.parts) for message in request(input=list(items), **fields).prompt.conversation]


def refused(**fields):
    with pytest.raises(ValidationFailed) as caught:
        call(**fields)
    return caught.value.param


# All that the installed SDK can send

VALUES = {
    "include": ["reasoning.encrypted_content"], "input": "x", "instructions": "y", "max_output_tokens": 5,
    "max_tool_calls": 3, "metadata": {"a": "b"}, "model": "m", "parallel_tool_calls": False,
    "previous_response_id": "resp_1", "prompt_cache_key": "k", "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "reasoning": {"effort": "low", "summary": "auto", "context": "auto", "mode": "standard"}, "safety_identifier": "s",
    "service_tier": "auto", "store": True, "stream": True, "stream_options": {"include_obfuscation": True},
    "temperature": 0.5, "text": {"format": {"type": "text"}, "verbosity": "low"}, "tool_choice": "auto", "tools": [ADD],
    "top_logprobs": 3, "top_p": 0.5, "truncation": "auto", "user": "u", "background": False,
    "access_programs": {}, "background_options": {}, "context_management": [], "image": {},
}  # fmt: skip
UNSUPPORTED = {"background": True, "conversation": "c", "moderation": {}, "prompt": {"id": "p"}}
SENT = {"stream", *typing.get_type_hints(response_create_params.ResponseCreateParamsBase)}


def test_all_that_the_sdk_can_send_is_known():
    assert {*VALUES, *UNSUPPORTED} == SENT


@pytest.mark.parametrize("name", VALUES)
def test_what_the_sdk_can_send_is_taken(name):
    assert call(**{name: VALUES[name]}).ignored == ()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_its_name(name):
    assert refused(**{name: UNSUPPORTED[name]}) == name


# Items


def test_instructions_and_first_developer_items_are_one_system_message():
    developer, system = {"role": "developer", "content": "b"}, {"type": "message", "role": "system", "content": "c"}
    found = conversation(developer, system, {"role": "user", "content": "d"}, developer, instructions="a")
    assert [(role, "".join(part.text for part in parts)) for role, parts in found] == [
        ("system", "a\n\nb\n\nc"), ("user", "d"), ("system", "b"),
    ]  # fmt: skip


def test_neighbours_of_one_role_are_joined_but_for_results():
    assert conversation(
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "content": None},
        {"role": "assistant", "content": [{"type": "output_text", "text": "d"}]},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "custom_tool_call", "call_id": "2", "name": "play", "input": "e4"},
        {"type": "function_call_output", "call_id": "1", "output": "2"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "e5"}]},
    ) == [
        ("user", (Text("ab"), Text("\n\n"), Text("c"))),
        (
            "assistant",
            (Reasoning("hm"), Text("d"), ToolCall("1", "add", {"a": 1}), ToolCall("2", "play", {"input": "e4"})),
        ),
        ("tool", (ToolResult("1", "2"),)),
        ("tool", (ToolResult("2", "e5"),)),
    ]


def test_the_history_is_not_judged():
    assert conversation(
        {"type": "function_call", "name": "f", "arguments": '{"a', "namespace": "n", "parsed_arguments": None},
        {"type": "function_call_output", "output": {"a": 1}},
        {"type": "web_search_call", "id": "ws"},
        {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "?"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "phase": "final_answer"},
    ) == [
        ("assistant", (ToolCall("", "n__f", {"arguments": '{"a'}, '{"a'),)),
        ("tool", (ToolResult("", '{"a": 1}'),)),
        ("assistant", (Text("No."),)),
    ]


@pytest.mark.parametrize(
    ("item", "place"),
    [
        (5, "input[0]"),
        ({"type": 5}, "input[0].type"),
        ({"role": "god", "content": "x"}, "input[0].role"),
        ({"role": "user", "content": 5}, "input[0].content"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[0].content[0].image_url"),
        ({"type": "function_call", "arguments": "{}"}, "input[0].name"),
        ({"type": "item_reference", "id": 5}, "input[0].id"),
    ],
)
def test_a_wrong_item_is_refused_with_its_place(item, place):
    assert refused(input=[item]) == place


def test_items_of_unknown_kinds_are_noted():
    assert call(input=[{"type": "compaction"}, {"type": "mesage"}]).ignored == ("input[1]",)


# Tools


def test_tools_become_functions():
    files = {
        "type": "namespace",
        "name": "files",
        "tools": [{"type": "function", "name": "read", "strict": True}, PLAY],
    }
    tools = {tool.name: tool for tool in request(tools=[ADD, PLAY, files, {"type": "web_search"}]).prompt.tools}
    assert list(tools) == ["add", "play", "files__read", "files__play"]
    assert tools["files__read"].strict is True
    assert tools["play"].parameters["required"] == ["input"]
    assert tools["files__read"].origin == "tools[2].tools[0]"


@pytest.mark.parametrize(
    ("choice", "expected", "offered"),
    [
        ("none", ToolChoice("none"), ["add", "play"]),
        ("required", ToolChoice("required"), ["add", "play"]),
        ({"type": "function", "name": "add"}, ToolChoice("function", "add"), ["add", "play"]),
        ({"type": "custom", "name": "play"}, ToolChoice("function", "play"), ["add", "play"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "play"}]},
            ToolChoice("required"),
            ["play"],
        ),
        ({"type": "any"}, ToolChoice("required"), ["add", "play"]),
    ],
)
def test_a_tool_choice_is_understood(choice, expected, offered):
    found = request(tools=[ADD, PLAY], tool_choice=choice)
    assert (found.tool_choice, [tool.name for tool in found.prompt.tools]) == (expected, offered)


def test_wrong_tools_are_refused():
    assert refused(tools=[ADD, ADD]) == "tools[1].name"
    assert refused(tools=[{"type": "function", "name": "a b"}]) == "tools[0].name"
    assert refused(tools=[ADD], tool_choice={"type": "function", "name": "sub"}) == "tool_choice"


def test_the_rest_of_a_request_is_honoured():
    schema = {"type": "object"}
    found = request(
        text={"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}},
        max_output_tokens=7, truncation="auto", reasoning={"effort": "none"}, top_p=0.5, parallel_tool_calls=False,
    )  # fmt: skip
    assert found.format == JsonFormat(schema, "text.format.schema")
    assert (found.max_tokens, found.sampling, found.tool_choice.parallel) == (7, {"top_p": 0.5}, False)
    assert (found.prompt.drops_oldest, found.prompt.template_kwargs) == (True, {"enable_thinking": False})
    assert request(text={}).format is None
    assert (
        request(top_logprobs=2).top_logprobs
        == request(top_logprobs=2, include=["message.output_text.logprobs"]).top_logprobs
        == 2
    )
    assert request(include=["message.output_text.logprobs"]).top_logprobs == 0
    assert request().top_logprobs is None
    assert (request().max_tokens, request(max_output_tokens=-1).max_tokens) == (None, NO_LIMIT)


# Text of custom tools


@given(st.text(), st.lists(st.integers(1, 5), min_size=1), st.booleans())
def test_any_cut_of_the_arguments_gives_the_same_text(text, steps, ascii):
    arguments = json.dumps({"input": text}, ensure_ascii=ascii)
    decoder, found, start = CustomInput(), "", 0
    while start < len(arguments):
        end = start + steps[start % len(steps)]
        found += decoder.feed(arguments[start:end])
        start = end
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert found + decoder.remainder == decoder.text == expected


@pytest.mark.parametrize("arguments", ["e4", '"e4"', '{"move": "e4"}', "", '{"input": 5}'])
def test_arguments_of_another_form_are_the_text(arguments):
    decoder = CustomInput()
    assert decoder.feed(arguments) == ""
    assert decoder.text == decoder.remainder == arguments


def test_a_cut_text_is_what_there_is_of_it():
    decoder = CustomInput()
    assert decoder.feed('{"input": "ab\\') + decoder.remainder == decoder.text == "ab"


# Encoder


def events_of(*parts):
    return [json.loads(block.split(b"data: ")[1]) for part in parts for block in part.split(b"\n\n") if block]


def test_a_heartbeat_before_the_start_begins_the_response():
    encoder = call().encoder
    first = events_of(encoder.heartbeat(None), encoder.heartbeat(PrefillProgress(1, 2)), encoder.start(3))
    assert [event["type"] for event in first] == ["response.created", *["response.in_progress"] * 2]
    assert [event["sequence_number"] for event in first] == [0, 1, 2]


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Failure("m", "server", code="step_failed"), "server_error"),
        (Failure("m", "rate_limit", code="queue_full"), "rate_limit_exceeded"),
        (Failure("m", "invalid_request", code="context_length_exceeded"), "context_length_exceeded"),
        (Failure("m", "invalid_request"), "invalid_prompt"),
    ],
)
def test_a_failure_ends_the_stream_with_what_there_is(failure, code):
    encoder = call().encoder
    encoder.start(3)
    encoder.event(Delta("a"), 0)
    (last,) = events_of(encoder.failed(failure))
    assert check(last, "ResponseEvent")["type"] == "response.failed"
    assert last["response"]["error"] == {"code": code, "message": "m"}
    assert last["response"]["output"][0]["content"][0]["text"] == "a"


def test_white_space_before_a_call_is_no_message():
    events = [Delta("\n\n"), ToolCallDelta(0, "{}", "call_1", "add"), Finish("tool_calls")]
    (item,) = json.loads(call(tools=[ADD]).encoder.complete([events], Usage(1, 2)))["output"]
    assert item["type"] == "function_call"


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_answer_without_a_word_is_a_message(text):
    events = [Delta(text), Finish("stop")] if text else [Finish("stop")]
    (item,) = json.loads(call().encoder.complete([events], Usage(1, 1)))["output"]
    assert item["content"][0]["text"] == text


# Store


def response(id, *items):
    return {"id": id, "output": [{"id": item} for item in items]}


def test_the_least_recently_used_response_leaves():
    store = ResponseStore(2, 10_000)
    for id in "ab":
        store.put("", response(id, f"item of {id}"), [])
    store.get("", "a")
    store.put("", response("c"), [])
    assert store.item("", "item of a") == {"id": "item of a"}
    assert store.item("", "item of b") is None
    with pytest.raises(ResponseNotFound):
        store.get("", "b")


def test_the_store_is_bounded_in_bytes():
    store = ResponseStore(100, 1000)
    for n in range(20):
        store.put("", response(str(n)), [{"id": "i", "text": "x" * 300}])
    assert len(store) == 2
    store.put("", response("large"), [{"text": "x" * 1000}])
    assert len(store) == 2
    store.delete("", "19")
    store.delete("", "18")
    store.put("", response("small"), [{"text": "x" * 900}])
    assert len(store) == 1


def test_a_store_of_none_keeps_none():
    store = ResponseStore(0, 1000)
    store.put("", response("a"), [])
    assert len(store) == 0
    made = call(Settings(response_store=0))
    whole = made.for_client(made, "").encoder.complete([[Finish("stop")]], Usage(1, 0))
    assert json.loads(whole)["store"] is False


def test_a_response_is_continued_with_all_its_items():
    dialect = ResponsesDialect(Settings())

    def ask(client, **fields):
        made = dialect.parse(orjson.dumps({"model": "m", **fields}))
        return made.for_client(made, client)

    first = ask("a", input="one", instructions="Be brief.")
    id = json.loads(first.encoder.complete([[Delta("two"), Finish("stop")]], Usage(1, 1)))["id"]
    second = ask("a", input="three", previous_response_id=id).requests[0].prompt.conversation
    assert [(message.role, message.text) for message in second] == [
        ("user", "one"), ("assistant", "two"), ("user", "three"),
    ]  # fmt: skip
    item = dialect.store.get("a", id).output_items[0]["id"]
    reference = {"type": "item_reference", "id": item}
    assert ask("a", input=[reference]).requests[0].prompt.conversation[0].text == "two"
    for client, items in (("a", [reference, reference]), ("b", [reference])):
        with pytest.raises(ValidationFailed, match="Invalid value|not found"):
            ask(client, input=items)
    with pytest.raises(ValidationFailed) as caught:
        ask("b", input="three", previous_response_id=id)
    assert caught.value.code == "previous_response_not_found"


def test_items_come_in_pages():
    items = [{"id": str(n)} for n in range(5)]
    page = item_page(items, {"limit": "2"})
    assert ([item["id"] for item in page["data"]], page["has_more"], page["last_id"]) == (["4", "3"], True, "3")
    page = item_page(items, {"order": "asc", "after": "3"})
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (["4"], False)
    for query in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "9"}):
        with pytest.raises(ValidationFailed):
            item_page(items, query)


def test_the_conversation_has_places_for_its_errors():
    messages = request(input=[{"role": "user", "content": "x"}], instructions="y").prompt.conversation
    assert [message.origin for message in messages] == ["instructions", "input[0]"]
    assert isinstance(messages[0], Message)
    assert parse(ResponseRequest, b'{"model":"m","input":"x"}').truncation == "disabled"
