"""What real programs send in each dialect beside chat completions, entry by entry, and the status that it gets."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.requests import UNASKED
from tools.harness.embedding_models import tiny_bert
from tools.harness.models import scripted_model, tiny_llama
from tools.harness.running_server import running_server

KEY, ADMIN_KEY = "sk-wire-0123456789", "sk-admin-0123456789"
CONTEXT = 2048
HELLO = [{"role": "user", "content": "hello"}]
MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
CHAT, GENERATE, EMBED, EMBEDDINGS = "/api/chat", "/api/generate", "/api/embed", "/v1/embeddings"
GOOD: dict[str, dict[str, Any]] = {
    MESSAGES: {"messages": HELLO, "max_tokens": 8},
    COUNT: {"messages": HELLO},
    RESPONSES: {"input": "hello"},
    CHAT: {"messages": HELLO, "stream": False},
    GENERATE: {"prompt": "hello", "stream": False},
    EMBED: {"model": "vectors", "input": "the cat"},
    EMBEDDINGS: {"model": "vectors", "input": "the cat"},
}
CACHE = {"type": "ephemeral"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class Entry:
    """One request of a list. holds: what is in the body of the answer."""

    path: str
    body: dict[str, Any]
    status: int = 200
    holds: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def entry(path, label, /, *, status=200, holds="", headers=None, **body):
    return pytest.param(Entry(path, body, status, holds, headers or {}), id=f"{path} {label}")


def words_of(value):
    return json.dumps(value).replace('"', "")[:60]


def user(*parts):
    return {"role": "user", "content": list(parts)}


EVERY_DIALECT = [
    *[entry(path, "all that comes unasked", **UNASKED) for path in GOOD],
    *[entry(path, "an unknown field", status=400, holds="foo", foo=1) for path in GOOD],
    *[
        entry(path, "anthropic-beta", headers={"anthropic-beta": "prompt-caching-2024-07-31,context-1m-2025-08-07"})
        for path in GOOD
    ],
    entry(MESSAGES, "max_tokens beyond the context", max_tokens=32000, holds="Hello there"),
    entry(RESPONSES, "max_output_tokens beyond the context", max_output_tokens=32000, holds="Hello there"),
    entry(CHAT, "num_predict beyond the context", options={"num_predict": 32000}, holds="Hello there"),
    entry(MESSAGES, "max_tokens -1", max_tokens=-1, holds="Hello there"),
    entry(RESPONSES, "max_output_tokens -1", max_output_tokens=-1, holds="Hello there"),
    entry(CHAT, "num_predict -1", options={"num_predict": -1}, holds="Hello there"),
]

CALL = {"type": "function_call", "name": "add", "call_id": "c", "arguments": "{}"}
CODEX_TOOLS = [
    {"type": "function", "name": "add", "parameters": SCHEMA, "strict": False, "defer_loading": True},
    {"type": "namespace", "name": "files", "tools": [{"type": "function", "name": "read", "parameters": SCHEMA}]},
    {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x+/"}},
    {"type": "custom", "name": "shell", "format": {"type": "text"}},
    {"type": "web_search", "external_web_access": False},
    {"type": "tool_search"},
    {"type": "image_generation", "output_format": "png"},
]
ITEMS = {
    "roles": [{"type": "message", "role": role, "content": "x"} for role in ("developer", "user", "assistant")],
    "parts": [
        user({"type": "input_text", "text": "hello", "cache_control": CACHE}),
        {"role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": []}]},
        *HELLO,
    ],
    "a call with text": [*HELLO, CALL, {"type": "function_call_output", "call_id": "c", "output": "3"}],
    "a call with parts": [
        *HELLO,
        CALL,
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "3"}]},
    ],
    "a call without its output": [*HELLO, CALL, *HELLO],
    "an output without its call": [*HELLO, {"type": "function_call_output", "call_id": "c", "output": "3"}],
    "cut arguments": [*HELLO, CALL | {"arguments": '{"a": '}, *HELLO],
    "reasoning": [
        *HELLO,
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}], "content": None},
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
        {"role": "assistant", "content": "x"},
        *HELLO,
    ],
    "items that only OpenAI makes": [*HELLO, {"type": "web_search_call", "id": "ws_1", "status": "completed"}],
    "system in the middle": [*HELLO, {"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}, *HELLO],
}
RESPONSES_LIST = [
    *[entry(RESPONSES, name, input=items) for name, items in ITEMS.items()],
    entry(RESPONSES, "Codex's tools", tools=CODEX_TOOLS, tool_choice="auto", parallel_tool_calls=True),
    entry(RESPONSES, "instructions", instructions="Be brief.", input=[{"role": "developer", "content": "x"}, *HELLO]),
    *[entry(RESPONSES, f"reasoning {words_of(each)}", reasoning=each) for each in (
        {}, None, {"effort": None}, *({"effort": effort, "summary": "auto"} for effort in EFFORTS)
    )],
    *[entry(RESPONSES, f"text {words_of(each)}", text=each) for each in (
        {}, None, {"verbosity": "low"}, {"format": {"type": "text"}}
    )],
    entry(
        RESPONSES, "text.format", model="tiny", max_output_tokens=9,
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
    ),
    entry(RESPONSES, "truncation", truncation="auto"),
    entry(RESPONSES, "sampling", temperature=0.5, top_p=0.5),
    entry(RESPONSES, "a stream", stream=True, holds="response.completed"),
    entry(RESPONSES, "a stream's parts", stream=True, holds="response.content_part.added"),
    entry(RESPONSES, "a previous response that is not kept", previous_response_id="resp_1", status=400),
]  # fmt: skip

ADD = {"name": "add", "description": "x", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1"}
TURN = [*HELLO, {"role": "assistant", "content": [USE]}]
HISTORIES = {
    "a result": [*TURN, user({**RESULT, "content": "3"})],
    "a result of parts": [*TURN, user({**RESULT, "content": [{"type": "text", "text": "3"}]})],
    "a result without content": [*TURN, user(RESULT)],
    "a result that is an error": [*TURN, user({**RESULT, "content": "x", "is_error": True, "cache_control": CACHE})],
    "a result and text": [*TURN, user({**RESULT, "content": "3"}, {"type": "text", "text": "hello"})],
    "a call without its result": [*TURN, *HELLO],
    "thinking": [
        *HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "x", "signature": "y"},
                {"type": "redacted_thinking", "data": "z"},
                {"type": "text", "text": "w"},
            ],
        },
        *HELLO,
    ],
    "system in the middle": [*HELLO, {"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}, *HELLO],
}
SERVER_TOOLS = [
    {"type": kind, "name": kind} for kind in ("web_search_20250305", "bash_20250124", "text_editor_20250728")
]
MESSAGES_LIST = [
    *[entry(path, name, messages=messages) for path in (MESSAGES, COUNT) for name, messages in HISTORIES.items()],
    entry("/v1/messages?beta=true", "the path of Claude Code", holds="Hello there"),
    entry("/v1/messages/count_tokens?beta=true", "the path of Claude Code", system="x", tools=[ADD]),
    entry(MESSAGES, "system parts", system=[
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=a1;"},
        {"type": "text", "text": "y", "cache_control": {**CACHE, "ttl": "1h", "scope": "global"}},
    ]),
    entry(MESSAGES, "server tools", tools=[ADD, *SERVER_TOOLS]),
    entry(MESSAGES, "tools with their marks", tools=[
        {**ADD, "cache_control": CACHE, "defer_loading": True, "eager_input_streaming": True, "type": "custom"}
    ]),
    entry(MESSAGES, "tool_choice auto", tools=[ADD], tool_choice={"type": "auto", "disable_parallel_tool_use": True}),
    entry(MESSAGES, "tool_choice none", tools=[ADD], tool_choice={"type": "none"}, holds="Hello there"),
    entry(MESSAGES, "tool_choice any", model="tiny", tools=[ADD], tool_choice={"type": "any"},
          max_tokens=60, holds="tool_use"),
    entry(MESSAGES, "tool_choice tool", model="tiny", tools=[ADD], tool_choice={"type": "tool", "name": "add"},
          max_tokens=60, holds="tool_use"),
    *[entry(MESSAGES, f"thinking {words_of(each)}", thinking=each) for each in (
        {"type": "enabled", "budget_tokens": 4096}, {"type": "enabled", "budget_tokens": -1}, {"type": "disabled"},
        {"type": "adaptive"}, {"type": "adaptive", "display": "summarized"},
    )],
    *[entry(MESSAGES, f"effort {effort}", output_config={"effort": effort}) for effort in EFFORTS],
    entry(MESSAGES, "output_config.format", model="tiny", max_tokens=9,
          output_config={"format": {"type": "json_schema", "schema": SCHEMA}}),
    entry(MESSAGES, "stop sequences", stop_sequences=["there"], top_k=5, holds="stop_sequence"),
    entry(MESSAGES, "a stream", stream=True, holds="message_stop"),
]  # fmt: skip

TOOL = {"type": "function", "function": {"name": "add", "description": "x", "parameters": SCHEMA}}
OPTIONS = {
    "num_predict": 9, "num_ctx": 8192, "temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.0,
    "repeat_penalty": 1.1, "repeat_last_n": 64, "seed": 1, "stop": ["x"], "num_keep": 5, "num_batch": 512, "num_gpu": 1,
    "main_gpu": 0, "num_thread": 4, "low_vram": False, "use_mmap": True, "numa": False, "typical_p": 1.0, "tfs_z": 1.0,
    "mirostat": 0, "penalize_newline": True, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
OLLAMA_LIST = [
    *[entry(path, "a stream by default", stream=None, holds='"done":true') for path in (CHAT, GENERATE)],
    *[entry(path, "all options", options=OPTIONS) for path in (CHAT, GENERATE)],
    *[entry(path, f"think {think}", think=think) for path in (CHAT, GENERATE) for think in (
        True, False, "low", "medium", "high", None
    )],
    *[entry(path, f"format {words_of(form)}", model="tiny", format=form, options={"num_predict": 9})
      for path in (CHAT, GENERATE) for form in ("json", SCHEMA)],
    *[entry(path, f"format {form!r}", format=form, holds="Hello there") for path in (CHAT, GENERATE) for form in (
        "", None
    )],
    *[entry(path, f"keep_alive {value}", keep_alive=value) for path in (CHAT, GENERATE) for value in (300, "5m", -1)],
    entry(CHAT, "a name with :latest", model="talker:latest", holds="talker:latest"),
    entry(CHAT, "tools", tools=[TOOL], holds="Hello there"),
    entry(CHAT, "a history with calls", messages=[
        *HELLO,
        {"role": "assistant", "content": "", "thinking": "x",
         "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_name": "add", "content": "3"},
        *HELLO,
    ], tools=[TOOL]),
    entry(CHAT, "cache_control in a message", messages=[{**HELLO[0], "cache_control": CACHE}]),
    entry(CHAT, "an empty list of images", messages=[{**HELLO[0], "images": []}]),
    entry(GENERATE, "an empty prompt loads", prompt="", holds='"load"'),
    entry(CHAT, "no messages load", messages=[], holds='"load"'),
    entry(GENERATE, "raw", raw=True, options={"num_predict": 2}),
    entry(GENERATE, "system", system="x"),
    entry(GENERATE, "a suffix to a model that can't", suffix="x", status=400, holds="suffix"),
    *[entry(EMBED, f"input {words_of(given)}", input=given) for given in ("the cat", ["the cat", "a dog"])],
    entry(EMBED, "options", options={"num_ctx": 512}, truncate=True, keep_alive="5m"),
    entry("/api/embeddings", "prompt", model="vectors", prompt="the cat", options={"num_ctx": 512}),
    entry("/api/show", "model", model="talker", verbose=True, holds="capabilities"),
    entry("/api/show", "name", model=None, name="talker:latest", holds="context_length"),
    entry("/api/pull", "a model that is there", model="talker", holds="success"),
]  # fmt: skip
EMBEDDINGS_LIST = [
    *[
        entry(EMBEDDINGS, f"input {words_of(given)}", input=given)
        for given in ("the cat", ["the cat", "a dog"], [2, 5, 3], [[2, 5, 3], [2, 6, 3]])
    ],
    *[entry(EMBEDDINGS, f"encoding_format {form}", encoding_format=form) for form in ("float", "base64", None)],
    entry(EMBEDDINGS, "dimensions of a model that allows none", dimensions=5, status=400, holds="dimensions"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server with a key, and a model of each kind."""
    directory = tmp_path_factory.mktemp("models")
    paths = {
        "talker": scripted_model(directory / "talker", {"hello": "Hello there, friend."}, context=CONTEXT),
        "tiny": tiny_llama(directory / "tiny"),
        "vectors": tiny_bert(directory / "vectors"),
    }
    models = [flag for key, path in paths.items() for flag in ("--model", f"{key}={path}")]
    with running_server(
        "--no-defaults", *models, "--api-key", KEY, "--admin-key", ADMIN_KEY, "--log-level", "warning"
    ) as server:
        yield server


def ask(server, path, headers, **body):
    good = GOOD.get(path.partition("?")[0], {})
    sent = json.dumps({"model": "talker", **good, **body}).encode()
    return server.ask("POST", path, sent, headers)


@pytest.mark.parametrize("entry", [*EVERY_DIALECT, *RESPONSES_LIST, *MESSAGES_LIST, *OLLAMA_LIST, *EMBEDDINGS_LIST])
def test_an_entry_of_the_lists_gets_its_status(server, entry):
    answer = ask(server, entry.path, {"x-api-key": KEY, **entry.headers}, **entry.body)
    assert answer.status == entry.status, answer.body
    assert entry.holds in answer.body.decode(), answer.body


@pytest.mark.parametrize("path", GOOD)
def test_a_key_comes_in_either_header(server, path):
    for headers, status in (
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"Authorization": "Bearer none", "x-api-key": KEY}, 200),
        ({"x-api-key": "none"}, 401),
        ({}, 401),
    ):
        assert ask(server, path, headers).status == status


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES, CHAT, GENERATE])
def test_too_long_a_prompt_is_refused_with_what_clients_look_for(server, path):
    text = "hello " * CONTEXT
    field = {MESSAGES: "messages", CHAT: "messages", RESPONSES: "input", GENERATE: "prompt"}[path]
    value = [{"role": "user", "content": text}] if field == "messages" else text
    answer = ask(server, path, {"x-api-key": KEY}, **{field: value})
    assert answer.status == 400
    assert f"maximum context length is {CONTEXT} tokens" in answer.body.decode()
    assert "prompt is too long" in answer.body.decode()
    if path == RESPONSES:
        assert answer.json["error"]["code"] == "context_length_exceeded"


def test_an_idle_connection_is_promised_to_stay_open_for_a_minute_in_each_dialect(server):
    for path in GOOD:
        promised = ask(server, path, {"x-api-key": KEY}).headers["keep-alive"]
        assert int(promised.partition("timeout=")[2].split(",")[0]) >= 60


def test_what_looks_for_an_ollama_finds_one(server):
    for method in ("GET", "HEAD"):
        answer = server.ask(method, "/", None, {"x-api-key": KEY})
        assert (answer.status, answer.body) == (200, b"Ollama is running" if method == "GET" else b"")
    for path in ("/api/version", "/api/tags", "/api/ps"):
        assert server.ask("GET", path, None, {"x-api-key": KEY}).status == 200


def test_copied_names_come_and_go(server):
    for method, path, body in (
        ("POST", "/api/copy", {"source": "talker", "destination": "copied"}),
        ("POST", "/api/generate", {"model": "copied", "prompt": "hello"}),
        ("DELETE", "/api/delete", {"model": "copied"}),
    ):
        answer = server.ask(method, path, json.dumps(body).encode(), {"x-api-key": ADMIN_KEY})
        assert answer.status == 200, answer.body
    gone = server.ask("POST", "/api/show", b'{"model":"copied"}', {"x-api-key": KEY})
    assert gone.status == 404


def test_models_have_the_shape_of_the_client(server):
    page = server.ask("GET", "/v1/models", None, {"x-api-key": KEY, "anthropic-version": "2023-06-01"}).json
    assert {"data", "has_more", "first_id", "last_id"} <= page.keys()
    assert page["data"][0]["type"] == "model"


LARK = "start: move+\nmove: LETTER DIGIT LF\n%import common.LETTER\n%import common.DIGIT\n%import common.LF"


@pytest.mark.parametrize(
    ("syntax", "definition", "expected"),
    [("regex", '[a-h][1-8]"?', '[a-h][1-8]"?'), ("lark", LARK, "([A-Za-z][0-9]\\n)+")],
)
def test_a_forced_custom_tool_gets_a_text_of_its_grammar(server, syntax, definition, expected):
    form = {"type": "grammar", "syntax": syntax, "definition": definition}
    asked = {"tools": [{"type": "custom", "name": "play", "format": form}], "max_output_tokens": 400}
    choice = {"tool_choice": {"type": "custom", "name": "play"}, "model": "tiny", "seed": 1}
    (item,) = ask(server, RESPONSES, {"x-api-key": KEY}, **asked, **choice).json["output"]
    assert (item["type"], item["name"]) == ("custom_tool_call", "play")
    if item["status"] == "completed":
        assert re.fullmatch(expected, item["input"])
    else:
        assert re.match(expected, item["input"])


def test_a_wrong_expression_of_a_custom_tool_is_refused_with_its_place(server):
    form = {"type": "grammar", "syntax": "regex", "definition": "(?=x)"}
    answer = ask(server, RESPONSES, {"x-api-key": KEY}, tools=[{"type": "custom", "name": "play", "format": form}])
    assert answer.status == 400
    assert answer.json["error"]["param"].startswith("tools[0].format")
