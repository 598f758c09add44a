"""Field cases: small requests after faults that are often reported of local model servers, over real sockets.

Each stands for a kind of fault. A conversation can always go on, calls arrive as the model wrote them, and no stream is
silent.
"""

import json

import pytest

from tests.support.field_models import WORDS, write_models
from tools.harness.running_server import running_server

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTE = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "size": {"type": "number"},
        "title": {"type": ["string", "null"]},
        "text": {"type": "string"},
    },
}
ADDRESS = {**CITY, "properties": {"to": {"type": "string", "pattern": r"^(?!\.)[a-z@.]+$"}}, "required": ["to"]}
FACTS = " ".join(f"Fact {n}: item {7 * n % 31} costs {13 * n % 97} coins." for n in range(60))


def tool(name, parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool("get_weather", CITY)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server with all models."""
    directory = tmp_path_factory.mktemp("field")
    lines = ["heartbeat_interval = 0.02"]
    for key, fields in write_models(directory).items():
        lines += [f"[models.{key}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
    (directory / "models.toml").write_text("\n".join(lines))
    with running_server(
        "--no-defaults", "--config", str(directory / "models.toml"), "--log-level", "warning"
    ) as server:
        yield server


def ask(server, model, *messages, **fields):
    """A chat at temperature 0; messages are (role, content) or whole ones."""
    written = [
        message if isinstance(message, dict) else dict(zip(("role", "content"), message, strict=True))
        for message in messages
    ]
    return server.post(
        "/v1/chat/completions", {"model": model, "messages": written, "temperature": 0, "max_tokens": 2, **fields}
    )


def calls_of(answer):
    """Names and arguments of an answer's calls."""
    functions = [call["function"] for call in answer.message.get("tool_calls") or []]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def called(arguments, id="c1"):
    """An assistant's message with one call."""
    function = {"name": "get_weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": id, "type": "function", "function": function}]}


def result(text, id="c1"):
    return {"role": "tool", "tool_call_id": id, "content": text}


# -- prefixes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["recurrent", "sliding", "plain"])
def test_most_of_a_conversation_comes_from_the_prefix_cache(server, model):
    """Also where a cache can't be trimmed: the same again, another answer in it, another question under its system."""
    system, first = ("system", FACTS), ("user", "First question?")
    assert ask(server, model, system, first).status == 200
    again = ask(server, model, system, first)
    other = ask(server, model, system, first, ("assistant", "Not what the model answered."), ("user", "Second?"))
    another = ask(server, model, system, ("user", "Another question?"))
    for answer in (again, other, another):
        assert answer.json["usage"]["prompt_tokens_details"]["cached_tokens"] >= 1500


# -- histories -------------------------------------------------------------------------------------------------------

HISTORIES = {
    "two system messages": [("system", "A"), ("system", "B"), ("user", "hi")],
    "a system message in the middle": [
        ("system", "A"),
        ("user", "hi"),
        ("assistant", "yes"),
        ("system", "B"),
        ("user", "go"),
    ],
    "a developer's beside a system message": [("developer", "A"), ("system", "B"), ("user", "hi")],
    "one system message": [("system", "A"), ("user", "hi")],
    "calls of one answer in two messages": [
        ("user", "W?"),
        called('{"city": "Oslo"}', "a"),
        called('{"city": "Rome"}', "b"),
        result("21 degrees", "a"),
        result("21 degrees", "b"),
    ],
    "a call without a result": [("user", "W?"), called('{"city": "Oslo"}'), ("user", "Never mind. Say hi.")],
    "a result without a call": [("user", "W?"), result("21 degrees"), ("user", "Say hi.")],
    "an assistant's null": [("user", "Hi"), {"role": "assistant", "content": None}, ("user", "Are you there?")],
    "a greeting first": [("system", "Play an innkeeper."), ("assistant", "Welcome."), ("user", "A room, please.")],
    "an assistant's message last": [("user", "Hi"), ("assistant", "Hello.")],
    "a system message last": [("user", "Hi"), ("assistant", "Hello."), ("system", "Ask for the name.")],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("model", ["smollm2", "strict", "plain", "recurrent"])
def test_a_history_of_any_order_is_answered(server, model, history):
    assert ask(server, model, *history, tools=[WEATHER]).status == 200


@pytest.mark.parametrize("arguments", ['{"city": "Os', "[]", "null", "", "{}", "Oslo"])
@pytest.mark.parametrize("model", ["smollm2", "strict", "xml"])
def test_a_call_with_foreign_arguments_does_not_end_the_conversation(server, model, arguments):
    history = [("user", "Weather?"), called(arguments), result("The call was not run."), ("user", "Try again: fine.")]
    assert ask(server, model, *history, tools=[WEATHER]).status == 200


def test_arguments_that_are_a_number_of_thousands_of_digits_do_not_either(server):
    """More digits than Python reads as an integer."""
    history = [("user", "Weather?"), called("1" * 5000), result("The call was not run."), ("user", "Try again: fine.")]
    assert ask(server, "xml", *history, tools=[WEATHER]).status == 200


def test_a_call_that_was_cut_can_be_sent_back(server):
    """What max_tokens cuts is what the client sends with its next request."""
    answer = ask(server, "caller", ("user", "cut"), tools=[WEATHER], max_tokens=4)
    assert answer.json["choices"][0]["finish_reason"] == "length"
    again = ask(server, "caller", ("user", "cut"), answer.message, result("not run"), ("user", "cut"), tools=[WEATHER])
    assert again.status == 200


# -- reasoning, channels, calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["closed", "open"])
def test_a_call_ends_the_reasoning(server, script):
    answer = ask(server, "thinker", ("user", script), tools=[WEATHER], max_tokens=None)
    assert calls_of(answer) == [("get_weather", {"city": "Oslo"})]
    assert answer.json["choices"][0]["finish_reason"] == "tool_calls"
    assert answer.message["reasoning_content"] == "Let me look."


def test_without_tools_a_call_is_text(server):
    answer = ask(server, "thinker", ("user", "open"), max_tokens=None)
    assert calls_of(answer) == []
    assert answer.json["choices"][0]["finish_reason"] == "stop"


def test_an_answer_that_is_all_reasoning_is_reasoning(server):
    answer = ask(server, "thinker", ("user", "sum"), max_tokens=None)
    assert answer.message["reasoning_content"] == "It is a sum. The answer is 42."
    assert answer.json["choices"][0]["finish_reason"] == "stop"


def test_channels_are_reasoning_and_answer(server):
    answer = ask(server, "channels", ("user", "say"), max_tokens=None)
    assert (answer.message["content"], answer.message["reasoning_content"]) == ("Hello there.", "A greeting.")


def test_a_call_in_a_channel_is_a_call(server):
    answer = ask(server, "channels", ("user", "use"), tools=[WEATHER], max_tokens=None)
    assert calls_of(answer) == [("get_weather", {"city": "Oslo"})]
    assert answer.json["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("bigint", {"id": 1234567890123456789}),
        ("bignumber", {"size": 9007199254740993}),
        ("digits", {"title": "123"}),
        ("braces", {"title": '{"a": 1}'}),
        ("word", {"text": "null"}),
        ("fine", {"id": 7, "text": "a\nb"}),
    ],
)
def test_values_in_xml_have_the_types_of_the_schema(server, script, arguments):
    answer = ask(server, "xml", ("user", script), tools=[tool("note", NOTE)], max_tokens=None)
    assert calls_of(answer) == [("note", arguments)]
    assert answer.json["choices"][0]["finish_reason"] == "tool_calls"


def test_arguments_in_xml_are_streamed(server):
    pieces = []
    with server.stream("xml", "long", temperature=0, tools=[tool("note", NOTE)]) as stream:
        for chunk in stream:
            for choice in chunk["choices"] if chunk != "[DONE]" else ():
                pieces += [call["function"].get("arguments") for call in choice["delta"].get("tool_calls") or ()]
    assert len(pieces) >= 10
    assert json.loads("".join(filter(None, pieces))) == {"text": WORDS}


# -- tools and schemas -----------------------------------------------------------------------------------------------


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 12}},
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("fields", [{}, {"response_format": schema_format(ANSWER)}], ids=["alone", "with a schema"])
def test_a_call_is_possible_beside_a_schema(server, fields):
    answer = ask(server, "caller", ("user", "call"), tools=[WEATHER], **{"max_tokens": 60, **fields})
    assert calls_of(answer) == [("get_weather", {"city": "Oslo"})]
    assert answer.json["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": {"type": "integer"},
            "maxProperties": 1,
        },
        {**ANSWER, "properties": {"answer": {"type": "string", "format": "password", "maxLength": 4}}},
    ],
    ids=["propertyNames", "an unknown format"],
)
def test_keywords_that_bind_nothing_are_taken(server, schema):
    answer = ask(server, "smollm2", ("user", "Give JSON."), response_format=schema_format(schema), max_tokens=20)
    assert answer.status == 200


def test_a_tool_that_cannot_be_enforced_is_named(server):
    tools = [WEATHER, tool("mail", ADDRESS)]
    answer = ask(server, "smollm2", ("user", "Weather in Oslo?"), tools=tools, tool_choice="required")
    assert answer.status == 400
    assert "mail" in answer.error["message"]


# -- silence, small things -------------------------------------------------------------------------------------------


def test_a_stream_is_not_silent_while_its_prompt_is_read(server):
    """The heartbeats before its first token tell how far the prompt is."""
    text = "one two three four five six seven eight nine ten. " * 60
    with server.stream("smollm2", text, temperature=0, max_tokens=2) as stream:
        lines = list(stream.response)
    first = next(number for number, line in enumerate(lines) if b'"content":"' in line and b'"content":""' not in line)
    assert any(line.startswith(b": prefill ") for line in lines[:first]), lines[: first + 1]


def test_max_tokens_of_minus_one_is_no_limit(server):
    assert ask(server, "thinker", ("user", "sum"), max_tokens=-1).status == 200


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
@pytest.mark.parametrize("model", ["smollm2", "strict"])
def test_any_reasoning_effort_is_taken_by_any_model(server, model, effort):
    assert ask(server, model, ("user", "Hi"), reasoning_effort=effort).status == 200


def test_a_byte_order_mark_is_skipped(server):
    body = {"model": "smollm2", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
    assert server.post("/v1/chat/completions", b"\xef\xbb\xbf" + json.dumps(body).encode()).status == 200
