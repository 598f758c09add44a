"""Requests of Anthropic's API: what they mean to the engine, and how they are refused."""

import orjson
import pytest

from mlxserver.api.anthropic.generation import MessagesDialect
from mlxserver.api.anthropic.prompt import CountTokensRequest
from mlxserver.api.schema.parameters import ValidationFailed, parse
from mlxserver.config.settings import Settings
from mlxserver.engine.conversation import Message, Reasoning, Text, ToolCall, ToolResult
from mlxserver.engine.requests import JsonFormat, ToolChoice

HELLO = [{"role": "user", "content": "hello"}]
ADD = {"name": "add", "input_schema": {"type": "object"}}
SEARCH = {"type": "web_search_20260318", "name": "web_search"}


def call(settings=Settings(), **fields):  # noqa: B008  (frozen)
    return MessagesDialect(settings).parse(orjson.dumps({"model": "m", "messages": HELLO, **fields}))


def request(**fields):
    (request,) = call(**fields).requests
    return request


def conversation(*messages, **fields):
    return request(messages=list(messages), **fields).prompt.conversation


def refused(**fields):
    with pytest.raises(ValidationFailed) as refusal:
        call(**fields)
    return refusal.value.param


def user(content):
    return {"role": "user", "content": content}


def assistant(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def text(value):
    return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}}


def result(content, **fields):
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **fields}


# Messages


def test_texts_of_a_client_are_set_apart_by_a_blank_line():
    system = [text("Be brief."), text(""), text("Be kind.")]
    assert conversation(user([text("a"), text("b")]), system=system) == (
        Message("system", (Text("Be brief.\n\nBe kind."),), "system"),
        Message("user", (Text("a\n\nb"),), "messages[0]"),
    )


def test_a_system_message_in_the_middle_stays_there():
    roles = [message.role for message in conversation(*HELLO, {"role": "system", "content": "Now in French."}, *HELLO)]
    assert roles == ["user", "system", "user"]


def test_an_answer_of_the_history_keeps_its_parts():
    use = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}, "caller": {"type": "direct"}}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    foreign = {"type": "server_tool_use", "id": "x", "name": "web_search", "input": {}}
    parts = conversation(*HELLO, assistant(thought, hidden, foreign, text("It"), text(" is"), use), *HELLO)[1].parts
    assert parts == (Reasoning("Hm."), Text("It"), Text(" is"), ToolCall("toolu_1", "add", {"a": 1}))


def test_results_come_before_the_text_beside_them():
    assert conversation(
        user([text("Go on."), result([text("1"), text("2")]), result(None, tool_use_id="toolu_2")])
    ) == (
        Message("tool", (ToolResult("toolu_1", "1\n\n2"),), "messages[0].content[1]"),
        Message("tool", (ToolResult("toolu_2", ""),), "messages[0].content[2]"),
        Message("user", (Text("Go on."),), "messages[0]"),
    )


@pytest.mark.parametrize(
    ("content", "shown"), [("no such file", "Error: no such file"), ("Error: no", "Error: no"), ("", "Error")]
)
def test_a_failed_call_is_told_by_its_text(content, shown):
    assert conversation(user([result(content, is_error=True)]))[0].text == shown


def test_text_of_documents_and_search_results_is_shown():
    plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    parts = {"type": "document", "source": {"type": "content", "content": [text("P")]}}
    found = {"type": "search_result", "source": "x", "title": "S", "content": [text("R")]}
    reference = {"type": "tool_reference", "tool_name": "add"}
    assert conversation(user([plain, parts, found, result([reference])]))[1].text == "T\n\nD\n\nP\n\nS\n\nR"


@pytest.mark.parametrize(
    "line", ["x-anthropic-billing-header: cc_version=2.1; cch=1a2b3;", "<total_tokens>4711 tokens left</total_tokens>"]
)
def test_lines_that_change_from_turn_to_turn_are_left_out(line):
    plain = conversation(*HELLO, system="Be brief.")
    assert conversation(*HELLO, {"role": "system", "content": line}, system=[text(line), text("Be brief.")]) == plain
    assert conversation(*HELLO, system=f"{line}\nBe brief.") == plain
    assert conversation(user([text("hello"), text(line)]), system="Be brief.") == plain
    about = f"What is '{line}'?"
    assert conversation(user(about))[0].text == about


def test_the_beginning_of_an_answer_is_continued_and_a_whole_one_is_not():
    use = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {}}
    beginnings = ([text("It is")], [text("")], [text("x"), use])
    continued = [request(messages=[*HELLO, assistant(*blocks)]).prompt.continues_answer for blocks in beginnings]
    assert continued == [True, False, False]


# Tools


def test_tools_and_the_choice_among_them():
    asked = call(tools=[SEARCH, {**ADD, "type": "custom", "strict": True}], tool_choice={"type": "any"})
    (tool,) = asked.requests[0].prompt.tools
    assert (tool.name, tool.strict, tool.schema_origin) == ("add", True, "tools[1].input_schema")
    assert (asked.requests[0].tool_choice, asked.ignored) == (ToolChoice("required"), ("tools[0]",))


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(parallel=False)),
        ({"type": "tool", "name": "add"}, ToolChoice("function", "add")),
        ({"type": "none"}, ToolChoice("none")),
    ],
)
def test_each_choice_has_its_meaning(choice, meant):
    asked = request(tools=[ADD], tool_choice=choice)
    assert asked.tool_choice == meant
    assert bool(asked.prompt.tools) == (meant.mode != "none")


# Thinking and format


@pytest.mark.parametrize(
    ("fields", "variables", "budget"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, {}, 2048),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, {}, None),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, {}, None),
        ({"thinking": {"type": "between_tools"}}, {}, None),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}, None),
        ({"output_config": {"effort": "xhigh"}}, {"reasoning_effort": "xhigh"}, None),
        (
            {"thinking": {"type": "disabled"}, "output_config": {"effort": "high", "task_budget": {}}},
            {"enable_thinking": False},
            None,
        ),
    ],
)
def test_thinking_is_switched(fields, variables, budget):
    asked = request(**fields)
    assert (asked.prompt.template_kwargs, asked.thinking_budget) == (variables, budget)


def test_a_format_is_named_by_its_place():
    form = {"type": "json_schema", "schema": {"type": "object"}}
    assert request(output_config={"format": form}).format == JsonFormat(form["schema"], "output_config.format.schema")
    assert request(output_format=form).format == JsonFormat(form["schema"], "output_format.schema")
    assert refused(output_format=form, output_config={"format": form}) == "output_format"


# Parameters


def test_what_programs_send_unasked_is_taken():
    fields = {
        "metadata": {"user_id": "x"},
        "service_tier": "auto",
        "context_management": {"edits": []},
        "cache_control": {"type": "ephemeral"},
        "betas": ["x"],
        "speed": "fast",
        "inference_geo": "eu",
    }
    asked = call(max_tokens=32_000, top_k=40, stop_sequences=["a", "b"], keep_alive="5m", **fields)
    assert (asked.ignored, asked.idle_timeout) == ((), 300.0)
    assert (asked.requests[0].stop, asked.requests[0].sampling) == (("a", "b"), {"top_k": 40})


def test_a_count_takes_the_request_that_it_is_made_for():
    body = {"model": "m", "messages": HELLO, "max_tokens": 1, "stream": True, "top_p": 0.5, "tools": [ADD, SEARCH]}
    assert parse(CountTokensRequest, orjson.dumps(body)).prompt == request(tools=[ADD, SEARCH]).prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [user(None)]}, "messages[0].content"),
        ({"messages": [user([result(5)])]}, "messages[0].content[0].content"),
        ({"messages": [assistant({"type": "tool_use", "id": "x"})]}, "messages[0].content[0].name"),
        ({"messages": [user([{"type": "image"}])]}, "messages[0].content[0].source"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"system": 5}, "system"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [ADD, ADD]}, "tools[1].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}}, "tool_choice.name"),
        ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_wrong_is_named(fields, param):
    assert refused(**fields) == param
