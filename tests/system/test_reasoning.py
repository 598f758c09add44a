"""What ends the reasoning, over real sockets: calls inside it, channels, marks of other families, no end at all."""

import json

import pytest

from tools.harness.models import scripted_model
from tools.harness.running_server import running_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OSLO = [["get_weather", '{"city": "Oslo"}']]
COMMENTARY = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}'
ANALYSIS = "<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant"

MODELS = {
    "thinker": {
        "generation_prompt": "<think>\n",
        "tokens": ["<think>", "</think>"],
        "scripts": {
            "closed": f"Let me look.\n</think>\n\n{CALL}",
            "open": f"Let me look.\n{CALL}",
            "draft": f"I could write\n{CALL}\nbut need not.\n</think>\n\nHello.",
            "mention": "I could use <tool_call> tags",
            "endless": "It is a sum. The answer is 42.",
            "again": "One.\n</think>\n\n<think>\n\n</think>\n\nHello.",
        },
    },
    "channels": {
        "tokens": ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>", "<|call|>", "<|constrain|>"],
        "scripts": {
            "say": f"{ANALYSIS}<|channel|>final<|message|>Hello there.",
            "use": COMMENTARY,
            "both": f"{ANALYSIS}<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant{COMMENTARY}",
            "silent": "<|channel|>analysis<|message|>A greeting.<|end|>",
        },
    },
    "gemma": {
        "tokens": ["<|channel>", "<channel|>"],
        "scripts": {
            "say": "<|channel>thought\nA greeting.\n<channel|>Hello there.<|channel>thought\n<channel|><channel|>"
        },
    },
    "structured": {
        "generation_prompt": "<|open|>think<|sep|>",
        "tokens": ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"],
        "scripts": {
            "say": "A greeting.<|close|>think<|sep|><|open|>response<|sep|>Hello there.<|close|>response<|sep|>"
            "<|close|>message<|sep|>"
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reasoning")
    paths = {key: scripted_model(directory / key, **fields) for key, fields in MODELS.items()}
    lines = [f"[models.{key}]\nsource = {json.dumps(str(path))}" for key, path in paths.items()]
    for key in ("thinker", "channels"):
        lines.append(f'[models.{key}-repeats]\nsource = {json.dumps(str(paths[key]))}\nunclosed_thinking = "content"')
    config = directory / "models.toml"
    config.write_text("\n".join(lines))
    with running_server("--no-defaults", "--config", str(config), "--log-level", "warning") as server:
        yield server


def answers(server, model, text, **parameters):
    """Reasoning, content, calls and finish reason of a whole answer, which are those of the stream."""
    (choice,) = server.chat(model, text, temperature=0, **parameters).json["choices"]
    message = choice["message"]
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]
    whole = (message.get("reasoning_content", ""), message["content"] or "", calls, choice["finish_reason"])
    assert streamed(server, model, text, **parameters) == whole
    return whole


def streamed(server, model, text, **parameters):
    texts, calls, reason = {"reasoning_content": "", "content": ""}, [], None
    with server.stream(model, text, temperature=0, **parameters) as stream:
        for payload in stream:
            if payload == "[DONE]":
                break
            (choice,) = payload["choices"]
            for name in texts:
                texts[name] += choice["delta"].get(name) or ""
            for call in choice["delta"].get("tool_calls", []):
                if call.get("id"):
                    calls.append([call["function"]["name"], ""])
                calls[call["index"]][1] += call["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return texts["reasoning_content"], texts["content"], calls, reason


@pytest.mark.parametrize(
    ("text", "tools", "answer"),
    [
        ("closed", [WEATHER], ("Let me look.", "", OSLO, "tool_calls")),
        ("open", [WEATHER], ("Let me look.", "", OSLO, "tool_calls")),
        ("open", None, (f"Let me look.\n{CALL}", "", [], "stop")),
        ("draft", [WEATHER], (f"I could write\n{CALL}\nbut need not.", "Hello.", [], "stop")),
        ("mention", [WEATHER], ("I could use <tool_call> tags", "", [], "stop")),
        ("endless", None, ("It is a sum. The answer is 42.", "", [], "stop")),
        ("again", None, ("One.", "Hello.", [], "stop")),
    ],
)
def test_a_call_ends_the_reasoning_unless_the_model_closes_it(server, text, tools, answer):
    assert answers(server, "thinker", text, **({"tools": tools} if tools else {})) == answer


def test_only_tokens_of_reasoning_count_as_such(server):
    usage = server.chat("thinker", "open", temperature=0, tools=[WEATHER]).json["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}
    usage = server.chat("thinker", "mention", temperature=0, tools=[WEATHER]).json["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": usage["completion_tokens"]}


def test_a_thinking_budget_does_not_cut_a_call(server):
    answer = answers(server, "thinker", "open", tools=[WEATHER], thinking_budget=6)
    assert answer == ("Let me look.", "", OSLO, "tool_calls")


def test_max_tokens_may_cut_a_call(server):
    answer = answers(server, "thinker", "open", tools=[WEATHER], max_tokens=8)
    assert answer == ("Let me look.", "", [["get_weather", '{"city":']], "length")


@pytest.mark.parametrize(
    ("text", "tools", "answer"),
    [
        ("say", None, ("A greeting.", "Hello there.", [], "stop")),
        ("use", [WEATHER], ("", "", OSLO, "tool_calls")),
        ("both", [WEATHER], ("A greeting.", "One moment.", OSLO, "tool_calls")),
        ("use", None, ("", '{"city": "Oslo"}', [], "stop")),
        ("silent", None, ("A greeting.", "", [], "stop")),
    ],
)
def test_channels_are_reasoning_content_and_calls(server, text, tools, answer):
    assert answers(server, "channels", text, **({"tools": tools} if tools else {})) == answer


def test_a_call_in_a_channel_comes_piece_by_piece(server):
    with server.stream("channels", "use", temperature=0, tools=[WEATHER]) as stream:
        deltas = [p["choices"][0]["delta"] for p in stream if p != "[DONE]" and p["choices"]]
    pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])]
    assert len(pieces) >= 2


@pytest.mark.parametrize("model", ["gemma", "structured"])
def test_marks_of_other_families_are_in_neither_text(server, model):
    assert answers(server, model, "say") == ("A greeting.", "Hello there.", [], "stop")


@pytest.mark.parametrize(
    ("model", "text", "reasoning"),
    [("thinker-repeats", "endless", "It is a sum. The answer is 42."), ("channels-repeats", "silent", "A greeting.")],
)
def test_an_answer_that_is_all_reasoning_can_be_content_too(server, model, text, reasoning):
    assert answers(server, model, text) == (reasoning, reasoning, [], "stop")
    assert answers(server, model, text, max_tokens=2)[1:] == ("", [], "length")
