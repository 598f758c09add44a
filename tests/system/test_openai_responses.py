"""Responses over real sockets, with OpenAI's own client as the oracle of every answer and event."""

import json

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent

from tests.support.published import check
from tools.harness.models import scripted_model
from tools.harness.running_server import running_server

USER, OTHER = "sk-user-0123456789", "sk-other-0123456789"
APP = "https://app.example.org"
EVENT, ITEM = pydantic.TypeAdapter(ResponseStreamEvent), pydantic.TypeAdapter(ResponseItem)
CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
OSLO, ROME = (CALL % ("get_weather", json.dumps({"city": city})) for city in ("Oslo", "Rome"))
PATCH = '*** Begin\n+ "caf\u00e9" \\ \U0001f600\n*** End'
SCRIPTS = {
    "hello": "Hello there, and hello there again.",
    "think": "<think>\nTwo and two are four.\n</think>\n\nIt is four.",
    "weather": f"<think>\nI look.\n</think>\n\nOne moment.\n{OSLO}",
    "two": f"{OSLO}\n{ROME}",
    "patch": CALL % ("apply_patch", json.dumps({"input": PATCH}, ensure_ascii=False)),
    "space": CALL % ("mcp__files__read", '{"path": "a"}'),
    "sunny": "It is sunny in Oslo.",
    "json": '{"city": "Oslo", "degrees": 3}',
}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


class Weather(pydantic.BaseModel):
    """Weather of a city."""

    city: str
    degrees: int


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("responses")
    path = scripted_model(directory / "m", SCRIPTS, tokens=("<think>", "</think>"), context=2048)
    sections = [f"[models.{key}]\nsource = {json.dumps(str(path))}" for key in ("m", "n")]
    config = directory / "models.toml"
    config.write_text("\n".join(["heartbeat_interval = 0.002", *sections]))
    access = ("--api-key", USER, "--api-key", OTHER, "--allow-origin", APP)
    with running_server("--no-defaults", "--config", str(config), *access, "--log-level", "warning") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=USER, max_retries=0) as client:
        yield client


def created(client, input, **fields):
    """A whole response, which is of the SDK's types and of the published schema."""
    raw = client.responses.with_raw_response.create(model="m", input=input, **fields)
    content = json.loads(raw.text)
    check(content, "Response")
    Response.model_validate_json(raw.text, strict=True)
    return raw.parse()


def streamed(client, input, model="m", **fields):
    """The events of a stream, each of the SDK's types and of the published schema, numbered without a gap."""
    with client.responses.with_streaming_response.create(model=model, input=input, stream=True, **fields) as raw:
        blocks = raw.read().decode().split("\n\n")
    events = []
    for block in filter(None, blocks):
        name, data = block.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        check(content, "ResponseEvent")
        EVENT.validate_json(data.removeprefix("data: "), strict=True)
        events.append(content)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events):
    """The types of the events in order, runs of one type once, heartbeats left out wherever they come."""
    start, rest = events[:2], [event for event in events[2:] if event["type"] != "response.in_progress"]
    found = [event["type"].removeprefix("response.") for event in (*start, *rest)]
    return [kind for n, kind in enumerate(found) if n < 2 or kind != found[n - 1]]


TEXT = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
SUMMARY = [f"reasoning_summary_{step}" for step in ("part.added", "text.delta", "text.done", "part.done")]
REASONING = ["output_item.added", *SUMMARY, "output_item.done"]
STREAMED = {
    "hello": [*TEXT, "output_item.done"],
    "think": [*REASONING, *TEXT, "output_item.done"],
    "weather": [
        *REASONING,
        *TEXT,
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ],
    "patch": [
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
    ],
}
PATCH_TOOL = {
    "type": "custom",
    "name": "apply_patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/s"},
}
FILES = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files.",
    "tools": [{"type": "function", "name": "read"}],
}
TOOLS = [WEATHER, PATCH_TOOL, FILES]


def without_ids(output):
    """Items as they are but for their ids, which every response makes anew, and for what the SDK parses."""
    left_out = ("id", "call_id", "parsed", "parsed_arguments")
    if isinstance(output, list):
        return [without_ids(item) for item in output]
    if isinstance(output, dict):
        return {name: without_ids(value) for name, value in output.items() if name not in left_out}
    return output


@pytest.mark.parametrize("word", STREAMED)
def test_a_stream_has_its_events_in_order_and_ends_in_what_a_whole_response_is(client, word):
    events = streamed(client, word, tools=TOOLS)
    assert kinds(events) == ["created", "in_progress", *STREAMED[word], "completed"]
    whole = created(client, word, tools=TOOLS).to_dict()
    last = events[-1]["response"]
    assert without_ids(last["output"]) == without_ids(whole["output"])
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"] > 0
    deltas = [event for event in events if event["type"].endswith(".delta")]
    done = [event for event in events if event["type"].endswith(("text.done", "arguments.done", "input.done"))]
    for end in done:
        pieces = "".join(each["delta"] for each in deltas if each["item_id"] == end["item_id"])
        assert pieces == next(end[name] for name in ("text", "arguments", "input") if name in end)


@pytest.mark.parametrize("word", STREAMED)
def test_the_sdk_puts_a_stream_together(client, word):
    with client.responses.stream(model="m", input=word, tools=TOOLS) as stream:
        types = [event.type for event in stream]
        final = stream.get_final_response()
    assert types[-1] == "response.completed"
    assert without_ids(final.to_dict()["output"]) == without_ids(created(client, word, tools=TOOLS).to_dict()["output"])


def test_reasoning_is_a_summary_and_is_counted(client):
    response = created(client, "think", reasoning={"effort": "high", "summary": "auto"})
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].summary[0].text == "Two and two are four."
    assert response.output_text == "It is four."
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert (response.reasoning.effort, response.reasoning.summary) == ("high", "auto")


def test_a_custom_tool_gets_its_text_and_a_namespace_its_name(client):
    (call,) = created(client, "patch", tools=TOOLS).output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "apply_patch", PATCH)
    (call,) = created(client, "space", tools=TOOLS).output
    assert (call.type, call.namespace, call.name, call.arguments) == (
        "function_call", "mcp__files", "read", '{"path": "a"}',
    )  # fmt: skip


def test_a_tool_is_called_and_its_result_answered(client):
    first = created(client, "weather", tools=[WEATHER])
    call = next(item for item in first.output if item.type == "function_call")
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": [{"type": "input_text", "text": "sun"}],
    }
    history = [{"role": "user", "content": "weather"}, *[item.to_dict() for item in first.output], result]
    second = created(client, [*history, {"role": "user", "content": "sunny?"}], tools=[WEATHER])
    assert second.output_text == "It is sunny in Oslo."
    by_id = created(
        client, [result, {"role": "user", "content": "sunny?"}], tools=[WEATHER], previous_response_id=first.id
    )
    assert by_id.usage.input_tokens == second.usage.input_tokens
    assert by_id.previous_response_id == first.id


def test_output_is_parsed_into_a_model(client):
    response = client.responses.parse(model="m", input="json", text_format=Weather)
    assert response.output_parsed == Weather(city="Oslo", degrees=3)
    assert json.loads(created(client, "json", text={"format": {"type": "json_object"}}).output_text)["degrees"] == 3
    assert created(client, "json", text={}).output_text.startswith("{")


def test_arguments_are_parsed_into_a_model(client):
    class Place(pydantic.BaseModel):
        city: str

    tool = openai.pydantic_function_tool(Place, name="get_weather")
    flat = {"type": "function", **tool["function"]}
    response = client.responses.parse(model="m", input="weather", tools=[flat])
    call = next(item for item in response.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Oslo"}


def test_logprobs_are_of_the_text(client):
    include = ["message.output_text.logprobs"]
    response = created(client, "hello", top_logprobs=2, include=include)
    tokens = response.output[0].content[0].logprobs
    assert "".join(token.token for token in tokens) == response.output_text
    assert {len(token.top_logprobs) for token in tokens} == {2}
    events = streamed(client, "hello", include=include)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert all(event["logprobs"] for event in deltas)


def test_a_cut_response_is_incomplete(client):
    response = created(client, "hello", max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert kinds(streamed(client, "hello", max_output_tokens=2))[-1] == "incomplete"


def test_a_response_is_kept_and_deleted(client):
    response = created(client, [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hello"}])
    raw = client.responses.with_raw_response.retrieve(response.id)
    Response.model_validate_json(raw.text, strict=True)
    assert raw.parse().output_text == response.output_text
    items = client.responses.input_items.list(response.id, order="asc", limit=1)
    assert [item.role for item in items] == ["developer", "user"]  # over two pages
    page = client.responses.input_items.with_raw_response.list(response.id)
    for item in check(json.loads(page.text), "ItemList")["data"]:
        ITEM.validate_python(item, strict=True)
    client.responses.delete(response.id)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(response.id)
        assert caught.value.code == "response_not_found"


def test_items_of_every_kind_are_given_back(client):
    first = created(client, "weather", tools=TOOLS)
    call = next(item for item in first.output if item.type == "function_call")
    second = created(
        client,
        [
            {"type": "item_reference", "id": item.id} for item in first.output
        ] + [
            {"type": "function_call_output", "call_id": call.call_id, "output": "sun"},
            {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "x"},
            {"type": "custom_tool_call_output", "call_id": "c", "output": "done"},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
            {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        ],
        tools=TOOLS,
    )  # fmt: skip
    page = client.responses.input_items.with_raw_response.list(second.id, order="asc")
    items = check(json.loads(page.text), "ItemList")["data"]
    for item in items:
        ITEM.validate_python(item, strict=True)
    assert [item["type"] for item in items] == [
        "reasoning", "message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output",
        "message",
    ]  # fmt: skip


def test_a_response_belongs_to_the_key_that_made_it(server, client):
    response = created(client, "hello")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=OTHER, max_retries=0) as other:
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.delete(response.id)
        with pytest.raises(openai.BadRequestError) as caught:
            other.responses.create(model="m", input="hello", previous_response_id=response.id)
        assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    assert client.responses.retrieve(response.id).id == response.id


def test_what_is_not_to_be_stored_is_not(client):
    response = created(client, "hello", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_too_long_an_input_is_refused_or_truncated(client):
    turns = [{"role": role, "content": "word " * 60} for _ in range(6) for role in ("user", "assistant")]
    history = [*turns, {"role": "user", "content": "hello"}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048 tokens") as caught:
        created(client, history)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    response = created(client, history, instructions="Be brief.", truncation="auto", max_output_tokens=100)
    assert response.output_text == SCRIPTS["hello"]
    assert 1500 < response.usage.input_tokens <= 1948
    with pytest.raises(openai.BadRequestError):
        created(client, "word " * 1000, truncation="auto")


def test_a_heartbeat_is_an_event(client):
    """The interval is short, and the model of this test is loaded first, which takes longer than that."""
    events = streamed(client, "hello", model="n")
    beats = [event for event in events[2:] if event["type"] == "response.in_progress"]
    assert beats and beats[0]["response"]["status"] == "in_progress"
    assert kinds(events) == ["created", "in_progress", *STREAMED["hello"], "completed"]


def test_pages_may_delete_responses(server):
    asked = {"Origin": APP, "Access-Control-Request-Method": "DELETE"}
    answer = server.ask("OPTIONS", "/v1/responses/resp_1", headers=asked)
    assert answer.status == 204
    assert "DELETE" in answer.headers["access-control-allow-methods"]


def test_a_conversation_that_was_a_chat_has_the_same_prompt(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    chat = client.chat.completions.create(
        model="m",
        tools=[{"type": "function", "function": {name: WEATHER[name] for name in ("name", "parameters", "strict")}}],
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "weather"},
            {"role": "assistant", "content": "One moment.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
            {"role": "user", "content": "sunny?"},
        ],
    )
    response = created(
        client,
        [
            {"role": "user", "content": "weather"},
            {"role": "assistant", "content": "One moment."},
            {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "sun"},
            {"role": "user", "content": "sunny?"},
        ],
        instructions="Be brief.",
        tools=[WEATHER],
    )
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.input_tokens_details.cached_tokens >= chat.usage.prompt_tokens - 1
    assert response.output_text == chat.choices[0].message.content


REFUSED = {
    "background": ({"background": True}, "background"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "prompt": ({"prompt": {"id": "p"}}, "prompt"),
    "image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,", "detail": "auto"}]}]},
        "input[0].content[0].image_url",
    ),
    "image in a result": (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]},
        "input[0].output[0].image_url",
    ),
    "no tool": ({"tool_choice": "required"}, "tool_choice"),
    "hosted tool": ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
    "no schema": ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    "reference": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
    "nothing": ({"input": None}, "input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(client, name):
    fields, param = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", extra_body={"input": "hello", **fields})
    assert caught.value.param == param


def test_tools_that_are_not_run_here_are_left_out_and_unknown_ones_noted(client):
    tools = [{"type": "web_search"}, {"type": "tool_search"}, {"type": "image_generation"}, {"type": "x"}, WEATHER]
    raw = client.responses.with_raw_response.create(model="m", input="hello", tools=tools)
    assert raw.headers["x-ignored-parameters"] == "tools%5B3%5D"
    assert raw.parse().output_text == SCRIPTS["hello"]


def test_only_allowed_tools_are_offered(client):
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}
    some = created(client, "hello", tools=TOOLS, tool_choice=allowed)
    assert some.usage.input_tokens < created(client, "hello", tools=TOOLS).usage.input_tokens
    assert some.tool_choice.type == "allowed_tools"
