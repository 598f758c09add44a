"""Anthropic's API as its official SDK sees it: every answer and every event is of the SDK's types."""

import json
from itertools import pairwise

import anthropic
import pydantic
import pytest
from anthropic.types import MessageTokensCount, ModelInfo

from tests.support.anthropic_types import checked, checked_error, checked_events, checked_message
from tests.support.published import check
from tools.harness.agents import agent_model, call, say
from tools.harness.models import ROOM
from tools.harness.running_server import eventually, running_server

HELLO = "Hello there, and hello there again."
ADD = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
KEY, ADMIN_KEY = "sk-anthropic-0123456789", "sk-admin-0123456789"
CONTEXT = 40_000  # of the agent's model: a token for each byte
STEPS = (call("Write", path="a"), call("Read", path="a"), call("Bash", command="ls"), say("All is done."))


@pytest.fixture(scope="module")
def server(tmp_path_factory, scripted_path, tiny_llama_path):
    directory = tmp_path_factory.mktemp("anthropic")
    scripted = {"source": str(scripted_path), "type": "instruction", "preload": True}
    models = {
        "talker": {**scripted, "aliases": ["claude-sonnet"]},
        "thinker": {**scripted, "type": "thinking"},
        "tiny": {"source": str(tiny_llama_path), "preload": True},
        "agent": {"source": str(agent_model(directory / "agent", STEPS, context=CONTEXT)), "context_length": CONTEXT},
        "late": {"source": str(scripted_path), "type": "instruction"},
        "later": {"source": str(scripted_path), "type": "instruction"},
        "narrow": {"source": str(scripted_path), "type": "instruction", "max_running": 1, "max_waiting": 0},
        "broken": {"source": str(directory / "broken")},
    }
    (directory / "broken").mkdir()
    (directory / "broken" / "config.json").write_text('{"model_type": "nothing"}')
    lines = [f'api_key = ["{KEY}"]', f'admin_key = ["{ADMIN_KEY}"]', "heartbeat_interval = 0.001"]
    for key, fields in models.items():
        lines += [f"[models.{key}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
    (directory / "models.toml").write_text("\n".join(lines))
    flags = ("--no-defaults", "--config", str(directory / "models.toml"), "--log-level", "warning")
    with running_server(*flags, "--max-body-bytes", "100000") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def asked(text="hello", model="talker", **parameters):
    return {"model": model, "max_tokens": 200, "messages": [{"role": "user", "content": text}], **parameters}


def post(server, body, path="/v1/messages"):
    return server.ask("POST", path, json.dumps(body).encode(), {"x-api-key": KEY, "anthropic-version": "2023-06-01"})


def whole(server, **parameters):
    answer = post(server, asked(**parameters))
    assert answer.status == 200, answer.body
    return checked_message(answer.json)


def events(server, **parameters):
    answer = post(server, asked(**parameters, stream=True))
    assert answer.status == 200, answer.body
    return checked_events(answer.body)


def told(events):
    """Each block of a stream: its type, and what its deltas are together."""
    blocks = []
    for event in events:
        if event.type == "content_block_start":
            assert event.index == len(blocks)
            blocks.append((event.content_block.type, ""))
        if event.type == "content_block_delta" and event.delta.type != "signature_delta":
            delta = event.delta
            text = getattr(delta, {"input_json_delta": "partial_json"}.get(delta.type, delta.type.partition("_")[0]))
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + text)
    return blocks


# Answers


def test_a_message_is_answered(client):
    message = client.messages.create(**asked())
    assert (message.content[0].text, message.stop_reason, message.model) == (HELLO, "end_turn", "talker")
    assert message.id.startswith("msg_")
    assert message._request_id


def test_an_answer_is_of_the_sdks_types(server):
    message = whole(server, system="Be brief.", metadata={"user_id": "x"}, service_tier="auto")
    assert message.usage.output_tokens > 3


def test_a_stream_adds_up_to_the_answer(client):
    with client.messages.stream(**asked()) as stream:
        assert "".join(stream.text_stream) == HELLO
        message = stream.get_final_message()
    assert (message.content[0].text, message.stop_reason) == (HELLO, "end_turn")
    assert message.usage.output_tokens == client.messages.create(**asked()).usage.output_tokens


def test_the_events_of_a_stream_come_in_order(server):
    sent = events(server)
    order = [event.type for event in sent if event.type != "content_block_delta"]
    assert order == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert told(sent) == [("text", HELLO)]


def test_reasoning_is_a_block_of_its_own(server, client):
    message = whole(server, text="think", model="thinker")
    assert [(block.type, getattr(block, block.type)) for block in message.content] == [
        ("thinking", "Two and two are four."),
        ("text", "It is four."),
    ]
    assert message.usage.output_tokens_details.thinking_tokens > 0
    assert told(events(server, text="think", model="thinker")) == [
        ("thinking", "Two and two are four."),
        ("text", "It is four."),
    ]
    with client.messages.stream(**asked("think", "thinker")) as stream:
        kept = stream.get_final_message().content[0]
    assert (kept.thinking, bool(kept.signature)) == ("Two and two are four.", True)


def test_a_call_is_a_block_with_its_input(server, client):
    message = whole(server, text="tool", tools=[ADD])
    (block,) = message.content
    assert (block.name, block.input, message.stop_reason) == ("add", {"a": 1, "b": 2}, "tool_use")
    assert block.id.startswith("toolu_")
    ((kind, text),) = told(events(server, text="tool", tools=[ADD]))
    assert (kind, json.loads(text)) == ("tool_use", {"a": 1, "b": 2})
    with client.messages.stream(**asked("tool", tools=[ADD])) as stream:
        assert stream.get_final_message().content[0].input == {"a": 1, "b": 2}


def test_a_round_trip_with_a_tool(client):
    first = client.messages.create(**asked("tool", tools=[ADD]))
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": [{"type": "text", "text": "3"}]}
    messages = [
        {"role": "user", "content": "tool"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "hello"}]},
    ]
    second = client.messages.create(model="talker", max_tokens=100, tools=[ADD], messages=messages)
    assert second.content[0].text == HELLO


def test_tools_that_this_server_does_not_know_are_left_out_and_named(server):
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    answer = post(server, asked("tool", tools=[search, ADD, {"type": "bash_20250124", "name": "bash"}]))
    assert checked_message(answer.json).content[0].name == "add"
    assert answer.headers["x-ignored-parameters"] == "tools%5B0%5D, tools%5B2%5D"


def test_a_choice_of_tools_is_enforced(server):
    for choice in ({"type": "any"}, {"type": "tool", "name": "add", "disable_parallel_tool_use": True}):
        message = whole(server, model="tiny", tools=[ADD], tool_choice=choice, max_tokens=300, seed=1)
        if message.stop_reason == "tool_use":
            assert {block.name for block in message.content} == {"add"}
    assert whole(server, text="tool", tools=[ADD], tool_choice={"type": "none"}).content[0].type == "text"


def test_a_stop_sequence_is_named(server):
    message = whole(server, stop_sequences=["nothing", "there"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == (
        "Hello ",
        "stop_sequence",
        "there",
    )
    assert events(server, stop_sequences=["there"])[-2].delta.stop_sequence == "there"


def test_a_limit_and_the_end_of_the_context_are_told_apart(server):
    limited = whole(server, text="forever", max_tokens=5)
    assert (limited.stop_reason, limited.usage.output_tokens) == ("max_tokens", 5)
    assert whole(server, model="tiny", max_tokens=32_000, temperature=0).stop_reason == "model_context_window_exceeded"


def test_the_beginning_of_an_answer_is_continued(server, tiny_tokenizer):
    beginning = {"role": "assistant", "content": "One two"}
    body = asked(model="tiny", max_tokens=8, temperature=0)
    body["messages"].append(beginning)
    message = checked_message(post(server, body).json)
    chat = server.ask(
        "POST",
        "/v1/chat/completions",
        json.dumps({**body, "continue_final_message": True}),
        {"Authorization": f"Bearer {KEY}"},
    )
    assert message.content[0].text == chat.message["content"]
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == chat.json["usage"]["prompt_tokens"]


def test_an_answer_is_held_to_a_schema(client):
    class Verdict(pydantic.BaseModel):
        ok: bool

    message = client.messages.parse(**asked(model="tiny", max_tokens=60), output_format=Verdict)
    assert isinstance(message.parsed_output, Verdict)


def test_a_schema_that_can_not_be_enforced_is_refused_with_its_place(server):
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"x": {"type": "nonsense"}}}}
    answer = post(server, asked(model="tiny", output_config={"format": form}))
    assert answer.status == 400
    assert "output_config.format.schema.properties.x.type" in checked_error(answer.json).message


def test_cached_tokens_are_not_among_the_input(server):
    body = asked("hello, this is a longer question than before " * 8, model="tiny", max_tokens=1)
    first, second = (checked_message(post(server, body).json).usage for _ in range(2))
    assert first.cache_read_input_tokens == 0
    assert second.cache_read_input_tokens > 20
    assert second.input_tokens + second.cache_read_input_tokens == first.input_tokens
    streamed = checked_events(post(server, {**body, "stream": True}).body)
    assert streamed[-2].usage.cache_read_input_tokens == second.cache_read_input_tokens


def test_a_prompt_without_an_answer_is_kept(server):
    body = asked("this prompt is only read, so that the next one is answered sooner " * 4, model="tiny")
    warming = checked_message(post(server, {**body, "max_tokens": 0}).json)
    assert (warming.content, warming.stop_reason, warming.usage.output_tokens) == ([], "max_tokens", 0)
    assert told(checked_events(post(server, {**body, "max_tokens": 0, "stream": True}).body)) == []
    answered = checked_message(post(server, {**body, "max_tokens": 2}).json)
    assert answered.usage.cache_read_input_tokens == warming.usage.input_tokens - 1


# Tokens


def test_the_tokens_of_a_request_are_counted(server, client):
    history = [
        {"role": "user", "content": "tool"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "1"}]},
    ]
    for request in (
        {"messages": history, "tools": [ADD], "system": "Be brief."},
        {"messages": history[:1], "tools": [ADD], "tool_choice": {"type": "none"}},
        {"messages": history[:1], "thinking": {"type": "disabled"}},
        {"messages": [*history[:1], {"role": "assistant", "content": "It"}]},
    ):
        counted = client.messages.count_tokens(model="agent", **request).input_tokens
        usage = client.messages.create(model="agent", max_tokens=1, **request).usage
        assert counted == usage.input_tokens + usage.cache_read_input_tokens
    answer = post(server, asked(), "/v1/messages/count_tokens")
    assert checked(answer.json, MessageTokensCount, "MessageTokensCount").input_tokens > 5


def test_a_conversation_that_moves_here_from_another_api_has_the_same_prompt(server, client):
    function = {"name": "add", "description": ADD["description"], "parameters": ADD["input_schema"]}
    call_there = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    answer_there = {"role": "assistant", "reasoning_content": "Hm.", "content": "I add.", "tool_calls": [call_there]}
    there = {
        "model": "agent",
        "max_tokens": 1,
        "tools": [{"type": "function", "function": function}],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add, as in another session."},
            answer_there,
            {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        ],
    }
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    use = {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "1"}]}
    headers = {"Authorization": f"Bearer {KEY}"}
    chat = server.ask("POST", "/v1/chat/completions", json.dumps(there).encode(), headers).json
    usage = client.messages.create(
        model="agent",
        max_tokens=1,
        tools=[ADD],
        system="Be brief.",
        messages=[
            {"role": "user", "content": "Add, as in another session."},
            {"role": "assistant", "content": [thought, {"type": "text", "text": "I add."}, use]},
            {"role": "user", "content": [result]},
        ],
    ).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat["usage"]["prompt_tokens"]
    assert usage.input_tokens == 1


# Errors


def refusal(client, **parameters):
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**asked(**parameters))
    error = caught.value
    checked_error(error.body)
    assert error.body["request_id"] == error.response.headers["request-id"] == error.request_id
    return error


def test_errors_are_of_the_sdks_classes(server, client):
    wrong = refusal(client, stop_sequences=[""])
    assert (type(wrong), wrong.type) == (anthropic.BadRequestError, "invalid_request_error")
    missing = refusal(client, model="nothing")
    assert (type(missing), missing.type) == (anthropic.NotFoundError, "not_found_error")
    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    denied = refusal(stranger)
    assert (type(denied), denied.type) == (anthropic.AuthenticationError, "authentication_error")


def test_a_client_that_may_not_is_denied(server):
    stranger = anthropic.Anthropic(
        base_url=server.url, api_key=KEY, max_retries=0, default_headers={"Origin": "https://evil.example"}
    )
    denied = refusal(stranger)
    assert (type(denied), denied.type) == (anthropic.PermissionDeniedError, "permission_error")


def wait_until_idle(server, model):
    """Wait until the server has noticed that the client of the model's last stream has left."""

    def idle():
        state = server.ask("GET", f"/v1/models/{model}", headers={"x-api-key": KEY}).json
        return state["running_requests"] == state["queued_requests"] == 0

    eventually(idle)


def test_a_full_queue_and_a_failed_load_can_be_tried_again_later(server, client):
    with client.messages.stream(**asked("forever", "narrow", max_tokens=ROOM - 1000)) as stream:
        next(iter(stream))
        full = refusal(client, model="narrow")
    wait_until_idle(server, "narrow")
    assert (type(full), full.type) == (anthropic.RateLimitError, "rate_limit_error")
    assert int(full.response.headers["retry-after"]) >= 1
    failed = refusal(client, model="broken")
    assert (failed.status_code, failed.type) == (503, "api_error")
    assert isinstance(failed, anthropic.InternalServerError)


def test_a_failure_within_a_stream_is_an_event(server, client):
    headers = {"x-api-key": ADMIN_KEY}
    with client.messages.stream(**asked("forever", "narrow", max_tokens=ROOM - 1000)) as stream:
        next(iter(stream))
        assert server.ask("POST", "/v1/models/unload", b'{"key":"narrow","mode":"abort"}', headers).status == 200
        with pytest.raises(anthropic.APIStatusError) as caught:
            stream.until_done()
    assert checked_error(caught.value.body).type == "api_error"
    assert caught.value.body["request_id"] == stream.response.headers["request-id"]


def test_a_body_that_is_too_large_is_named_so(server):
    answer = post(server, asked("x" * 200_000))
    assert (answer.status, answer.json["error"]["type"]) == (413, "request_too_large")
    check(answer.json, "AnthropicError")


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_programs_look_for(client):
    error = refusal(client, text="word " * 3000, model="tiny")
    assert "prompt is too long: " in error.message
    assert "maximum context length is 2048 tokens" in error.message


def test_an_unknown_path_answers_clients_of_this_api_in_its_shape(server):
    answer = post(server, {}, "/v1/messages/batches")
    assert (answer.status, checked_error(answer.json).type) == (404, "not_found_error")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (
            [{"type": "text", "text": "hello"}, {"type": "image", "source": {"type": "url"}}],
            "messages[0].content[1].source.url",
        ),
        (
            [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image", "source": {}}]}],
            "messages[0].content[0].content[0].source.type",
        ),
        ([{"type": "document", "source": {"type": "base64"}}], "messages[0].content[0]"),
        ([{"type": "container_upload"}], "messages[0].content[0].type"),
        ([{"type": "text"}], "messages[0].content[0].text"),
        ([{}], "messages[0].content[0]"),
        (5, "messages[0].content"),
    ],
)
def test_what_a_model_can_not_be_shown_is_refused_by_its_place(client, content, place):
    assert f"'{place}'" in refusal(client, text=content).body["error"]["message"]


# Heartbeats


def test_pings_before_the_message_disturb_no_stream(server, client):
    """The models are loaded for their requests, which takes longer than the interval of the heartbeats."""
    body = post(server, asked(model="late", stream=True)).body
    assert body.startswith(b'event: ping\ndata: {"type":"ping"}\n\n')
    assert told(checked_events(body)) == [("text", HELLO)]
    with client.messages.stream(**asked(model="later")) as stream:
        assert stream.get_final_text() == HELLO


# Models


def test_models_are_listed_in_the_shape_of_the_clients_api(server, client):
    listed = list(client.models.list(limit=2))
    assert [model.id for model in listed] == ["talker", "thinker", "tiny", "agent", "late", "later", "narrow", "broken"]
    assert client.models.retrieve("talker").display_name == "talker"
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    page = server.ask("GET", "/v1/models?limit=2&after_id=thinker", headers=headers).json
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("tiny", "agent", True)
    before = server.ask("GET", "/v1/models?limit=2&before_id=agent", headers=headers).json
    assert ([model["id"] for model in before["data"]], before["has_more"]) == (["thinker", "tiny"], True)
    for model in check(page, "ModelPage")["data"]:
        checked(model, ModelInfo, "ModelInfo")
    assert server.ask("GET", "/v1/models?limit=0", headers=headers).json["error"]["type"] == "invalid_request_error"
    assert server.ask("GET", "/v1/models", headers={"x-api-key": KEY}).json["object"] == "list"


# A session of a coding agent


TOOLS = [
    {
        "name": name,
        "description": f"{name} something. " * 4,
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}, "command": {"type": "string"}}},
        "eager_input_streaming": True,
    }
    for name in ("Write", "Read", "Bash", *(f"Tool{n}" for n in range(9)))
]
CACHE = {"type": "ephemeral"}


def session(number):
    """A request of a coding agent, in a session whose first line is its own."""
    return {
        "model": "agent",
        "max_tokens": 32_000,
        "stream": True,
        "tools": TOOLS,
        "system": [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.{number}; cc_entrypoint=cli;"},
            {"type": "text", "text": "You are a coding agent.", "cache_control": CACHE},
            {"type": "text", "text": "Work with care. " * 30, "cache_control": CACHE},
        ],
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "user_x_account__session_y"},
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>\nBe brief.\n</system-reminder>"},
                    {"type": "text", "text": "Write notes.txt", "cache_control": CACHE},
                ],
            }
        ],
    }


def test_a_session_of_a_coding_agent_calls_its_tools_and_reuses_its_prefix(server):
    body = session(1)
    used = []
    for step in range(4):
        with_counter = {"role": "system", "content": f"<total_tokens>{99999 - step} tokens left</total_tokens>"}
        answer = post(server, {**body, "messages": [*body["messages"], with_counter]}, "/v1/messages?beta=true")
        sent = checked_events(answer.body)
        used.append(sent[-2].usage)
        blocks = [
            event.content_block.model_dump(exclude_none=True) for event in sent if event.type == "content_block_start"
        ]
        for block, (kind, text) in zip(blocks, told(sent), strict=True):
            block[{"tool_use": "input"}.get(kind, kind)] = json.loads(text) if kind == "tool_use" else text
        if sent[-2].delta.stop_reason == "end_turn":
            break
        assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
        result = {"type": "tool_result", "tool_use_id": blocks[-1]["id"], "content": "done", "is_error": False}
        body["messages"] += [{"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    assert blocks[-1]["text"] == "All is done."
    for earlier, later in pairwise(used):
        assert later.cache_read_input_tokens >= earlier.input_tokens + earlier.cache_read_input_tokens - 20
    another = checked_events(post(server, session(2)).body)[-2].usage
    assert another.cache_read_input_tokens > 0.9 * (used[0].input_tokens + used[0].cache_read_input_tokens)
