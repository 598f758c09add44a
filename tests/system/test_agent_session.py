"""A long session of an agent with tools, streamed, on a scripted model: every call arrives, every turn is answered."""

import json

import pytest

from tools.harness.agents import agent_model, call, say
from tools.harness.running_server import running_server

TURNS = 30
TOOL = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}},
    },
}
PROMPT = "You are a coding agent. Read before you write, and write what was asked for. " * 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("agent")
    path = agent_model(
        directory / "agent", [*(call("write", **arguments(turn)) for turn in range(TURNS)), say("Done.")]
    )
    config = f'[models.agent]\nsource = "{path}"\ncontext_length = 60000\n'
    (directory / "models.toml").write_text(config)
    with running_server(
        "--no-defaults", "--config", str(directory / "models.toml"), "--log-level", "warning"
    ) as server:
        yield server


def arguments(turn):
    return {"path": f"notes-{turn}.txt", "text": f'    line {turn}\n\t"quoted" null 123 \u00fc\n'}


def stream(server, messages, **fields):
    """One streamed turn: the answer's message as a client puts it together, its finish_reason and usage."""
    body = {"model": "agent", "messages": messages, "tools": [TOOL], "stream": True, "temperature": 0, **fields}
    message, finish, usage = {"role": "assistant", "content": "", "reasoning_content": ""}, None, None
    calls = {}
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream_options": {"include_usage": True}}))
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        assert "error" not in chunk, chunk
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            finish = choice["finish_reason"] or finish
            for field in ("content", "reasoning_content"):
                message[field] += choice["delta"].get(field) or ""
            for piece in choice["delta"].get("tool_calls") or ():
                entry = calls.setdefault(
                    piece["index"], {"type": "function", "function": {"name": "", "arguments": ""}}
                )
                entry |= {"id": piece["id"]} if piece.get("id") else {}
                for field, value in piece["function"].items():
                    entry["function"][field] += value or ""
    connection.close()
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message, finish, usage


@pytest.mark.parametrize("keeps_reasoning", [True, False], ids=["reasoning sent back", "reasoning dropped"])
def test_thirty_turns_lose_nothing_and_reuse_the_prefix(server, keeps_reasoning):
    word = "notes.txt" + (" again" if keeps_reasoning else "")
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": f"Write {word}"}]
    read = 0
    for turn in range(TURNS):
        message, finish, usage = stream(server, messages)
        assert finish == "tool_calls"
        (made,) = message["tool_calls"]
        assert json.loads(made["function"]["arguments"]) == arguments(turn)
        assert message["reasoning_content"] == "I should call write."
        assert usage["prompt_tokens_details"]["cached_tokens"] >= read
        read = usage["prompt_tokens"] - len("<think>\n") - 2  # without what opens the answer
        if not keeps_reasoning:
            del message["reasoning_content"]
        messages += [message, {"role": "tool", "tool_call_id": made["id"], "content": f"wrote {turn}"}]
    message, finish, _ = stream(server, messages)
    assert (message["content"], finish) == ("Done.", "stop")


def test_a_session_goes_on_after_what_went_wrong_in_it(server):
    """A call that was cut, one without its result, a system message between, a result without its call."""
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "Write notes.txt"}]
    cut, finish, _ = stream(server, messages, max_tokens=12)
    assert finish == "length"
    messages += [
        cut,
        {"role": "system", "content": "The answer was cut. Go on."},
        {"role": "user", "content": "Go on."},
    ]
    message, finish, _ = stream(server, messages)
    assert finish == "tool_calls"
    messages += [message, {"role": "user", "content": "Never mind that one."}]
    messages += [{"role": "tool", "tool_call_id": "of an earlier session", "content": "wrote"}]
    message, finish, _ = stream(server, messages)
    assert finish == "tool_calls"
