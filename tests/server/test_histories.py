"""Histories that agents and front ends send are answered, whatever the template takes: over real sockets."""

import json

import pytest

from tests.support.published import check
from tools.harness.models import CHATML, scripted_model, tiny_llama
from tools.harness.running_server import running_server

FIRST_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message has to be the first') }}{% endif %}{% endfor %}" + CHATML
)
ALTERNATING = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}{% endfor %}" + FIRST_SYSTEM
)
MODELS = {
    "thinker": (FIRST_SYSTEM + "<think>\n", "thinking"),
    "alternating": (ALTERNATING, "instruction"),
    "lenient": (CHATML, "instruction"),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CUT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    sources = {key: (tiny_llama(path / key, template=template), kind) for key, (template, kind) in MODELS.items()}
    sources["caller"] = scripted_model(path / "caller", {"cut": CUT}), "instruction"
    lines = [
        f"[models.{json.dumps(key)}]\nsource = {json.dumps(str(source))}\ntype = {json.dumps(kind)}"
        for key, (source, kind) in sources.items()
    ]
    (path / "models.toml").write_text("\n".join(lines))
    flags = ("--no-defaults", "--config", str(path / "models.toml"), "--log-level", "warning")
    with running_server(*flags) as server:
        yield server


def says(role, text):
    return {"role": role, "content": text}


def call(arguments, id_="c1"):
    return {"id": id_, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def calls(*tool_calls):
    return {"role": "assistant", "content": None, "tool_calls": list(tool_calls)}


def result(id_="c1"):
    return {"role": "tool", "tool_call_id": id_, "content": "21 degrees"}


USER = says("user", "Weather?")
OSLO, ROME = '{"city": "Oslo"}', '{"city": "Rome"}'
HISTORIES = {
    "two system messages": [says("system", "A"), says("system", "B"), USER],
    "a system message in the middle": [USER, says("assistant", "yes"), says("system", "B"), says("user", "go")],
    "a system message last": [says("system", "A"), USER, says("assistant", "yes"), says("system", "B")],
    "a developer's beside it": [says("developer", "A"), says("system", "B"), USER],
    "nothing but a system message": [says("system", "A")],
    "a greeting": [says("system", "Play an innkeeper."), says("assistant", "Welcome."), USER],
    "an assistant's null": [USER, says("assistant", None), says("user", "Are you there?")],
    "a user's null": [says("user", None), USER],
    "an answer last": [USER, says("assistant", "It is")],
    "calls of one answer in two messages": [USER, calls(call(OSLO)), calls(call(ROME, "c2")), result(), result("c2")],
    "a call without a result": [USER, calls(call(OSLO)), says("user", "Never mind.")],
    "a call last": [USER, calls(call(OSLO))],
    "a result without a call": [USER, result(), says("user", "And?")],
    "a user behind a result": [USER, calls(call(OSLO)), result(), says("user", "And?")],
    "no ids": [
        USER,
        calls({"function": {"name": "get_weather", "arguments": OSLO}}),
        {"role": "tool", "content": "21"},
    ],
    "an unknown function": [USER, calls({"id": "1", "function": {"name": "gone", "arguments": OSLO}}), result("1")],
} | {
    f"arguments {text!r}": [USER, calls(call(text)), result(), USER] for text in ('{"city": "Os', "[]", "null", "", "x")
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("messages", HISTORIES.values(), ids=HISTORIES)
def test_a_history_is_answered(server, model, messages):
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 2, "tools": [TOOL]}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    check(answer.json, "ChatCompletion")


def test_a_call_that_was_cut_can_be_sent_back(server):
    body = {"model": "caller", "messages": [says("user", "cut")], "tools": [TOOL], "temperature": 0, "max_tokens": 4}
    (choice,) = server.post("/v1/chat/completions", body).json["choices"]
    assert choice["finish_reason"] == "length"
    body["messages"] += [choice["message"], says("user", "cut")]
    assert server.post("/v1/chat/completions", body).status == 200


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("effort", ["none", "minimal", "low", "high", "max"])
def test_any_model_takes_any_effort(server, model, effort):
    answer = server.chat(model, "hello", max_tokens=2, reasoning_effort=effort)
    assert answer.status == 200, answer.body
