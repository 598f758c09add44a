"""What real programs send, entry by entry: the request as it comes, and the status that it gets."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlxserver.api.openai.chat import ChatCompletionRequest
from tests.support.requests import UNASKED
from tools.harness.models import scripted_model
from tools.harness.running_server import running_server

KEY = "sk-wire-0123456789"
CHAT, BARE = "/v1/chat/completions", "/v1/completions"
CONTEXT = 1024
HELLO = [{"role": "user", "content": "hello"}]
ANSWER, THOUGHT, FINAL = "Hello there, friend.", "Two and two are four.", "It is four."
FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
ADD = {"type": "function", "function": FUNCTION}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CACHE = {"type": "ephemeral"}


@dataclass(frozen=True)
class Entry:
    """One request of a list. expect: fields of the answer's message. headers: of the request."""

    name: str
    body: dict[str, Any]
    model: str = "talker"
    path: str = CHAT
    status: int = 200
    expect: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    prefix: bytes = b""


def chat(name, **fields):
    """An entry of a chat, whose body is what is not a field of Entry."""
    own = {key: fields.pop(key) for key in ("model", "status", "expect", "headers", "prefix") if key in fields}
    return pytest.param(Entry(name, {"messages": HELLO, **fields}, **own), id=name)


def bare(name, **fields):
    return pytest.param(Entry(name, {"prompt": "hello", "max_tokens": 2, **fields}, path=BARE), id=f"bare {name}")


UNASKED_IN_CHATS = UNASKED | {"prompt_cache_options": {"ttl": 5}}
EVERY_DIALECT = [
    chat("max_tokens beyond the context", max_tokens=32000, expect={"content": ANSWER}),
    chat("max_completion_tokens beyond the context", max_completion_tokens=32000, expect={"content": ANSWER}),
    *[chat(name, **{name: value}, expect={"content": ANSWER}) for name, value in UNASKED_IN_CHATS.items()],
    *[bare(name, **{name: value}) for name, value in UNASKED_IN_CHATS.items()],
    chat("all of them together", **UNASKED_IN_CHATS, expect={"content": ANSWER}),
    chat("null for everything", **dict.fromkeys(ChatCompletionRequest.__fields__.keys() - {"model", "messages"})),
    chat("anthropic-beta", headers={"anthropic-beta": "prompt-caching-2024-07-31,context-1m-2025-08-07"}),
    chat("cache_control in a message", messages=[{**HELLO[0], "cache_control": CACHE}]),
    chat(
        "cache_control in a part",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hello", "cache_control": CACHE}]}],
        expect={"content": ANSWER},
    ),
    chat("cache_control in a tool", tools=[{**ADD, "cache_control": CACHE}]),
    chat("cache_control in a function", tools=[{"type": "function", "function": {**FUNCTION, "cache_control": CACHE}}]),
    chat("defer_loading in a tool", tools=[{**ADD, "defer_loading": True}]),
    chat("eager_input_streaming in a tool", tools=[{**ADD, "eager_input_streaming": True}]),
    chat("strict beside a function", tools=[{**ADD, "strict": False}]),
    chat("strict is null", tools=[{"type": "function", "function": {**FUNCTION, "strict": None}}]),
    chat("a field that is unknown", foo=1, status=400),
    chat("a field of a message that is unknown", messages=[{**HELLO[0], "foo": 1}], status=400),
    chat("a field of a tool that is unknown", tools=[{**ADD, "foo": 1}], status=400),
]

EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max", "default", "auto", "a lot"]
OFF: list[dict[str, Any]] = [
    {"reasoning_effort": "none"},
    {"enable_thinking": False},
    {"think": False},
    {"thinking": {"type": "disabled"}},
    {"reasoning": {"effort": "none"}},
    {"reasoning": {"enabled": False}},
    {"chat_template_kwargs": {"enable_thinking": False}},
]
ON: list[dict[str, Any]] = [
    {"enable_thinking": True},
    {"think": True},
    {"thinking": {"type": "enabled"}},
    {"thinking": {"type": "enabled", "budget_tokens": -1}},
    {"thinking": {"type": "enabled", "budget_tokens": 4096}},
    {"thinking": {"type": "adaptive"}},
    {"reasoning": {}},
    {"reasoning": {"enabled": True, "max_tokens": 4096}},
    {"thinking_budget": -1},
    {"thinking_budget": 4096},
]
EFFORT_WORDS: list[dict[str, Any]] = [
    {"reasoning": {"effort": "high", "summary": "auto"}},
    {"think": "high"},
    {"reasoning_effort": "medium", "reasoning": {"effort": "medium"}, "enable_thinking": True},
]
THINKING = {"reasoning_content": THOUGHT, "content": FINAL}
SYSTEM = {"role": "system", "content": "Be brief."}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "3"}
OTHER_CALLS = {**CALLS, "tool_calls": [{**CALL, "id": "call_2"}]}
CUT = {**CALL, "function": {"name": "add", "arguments": '{"a": '}}
HISTORIES = {
    "several system messages": [SYSTEM, SYSTEM, *HELLO],
    "a system message in the middle": [*HELLO, {"role": "assistant", "content": "Hi"}, SYSTEM, *HELLO],
    "developer beside system": [SYSTEM, {"role": "developer", "content": "Be kind."}, *HELLO],
    "calls of one answer in two messages": [*HELLO, CALLS, OTHER_CALLS, RESULT, *HELLO],
    "a call without its result": [*HELLO, CALLS, *HELLO],
    "a result without its call": [*HELLO, RESULT, *HELLO],
    "content is null without calls": [*HELLO, {"role": "assistant", "content": None}, *HELLO],
    "cut arguments": [*HELLO, {**CALLS, "tool_calls": [CUT]}, RESULT, *HELLO],
    "a greeting of the assistant first": [{"role": "assistant", "content": "Hi"}, *HELLO],
}
OPEN_WEBUI = {
    "repeat_penalty": 1.1,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5.0,
    "num_ctx": 8192,
    "num_predict": 128,
    "num_keep": 24,
    "num_batch": 512,
    "num_gpu": 1,
    "num_thread": 4,
    "repeat_last_n": 64,
    "tfs_z": 1,
    "use_mmap": True,
    "use_mlock": False,
}


def words_of(fields):
    return json.dumps(fields).replace('"', "")


CHAT_COMPLETIONS = [
    *[
        chat(
            f"reasoning_effort {effort} to a {model}",
            model=model,
            reasoning_effort=effort,
            **({"messages": [{"role": "user", "content": "think"}]} if model == "thinker" else {}),
            expect={"content": FINAL} if model == "thinker" and effort != "none" else {},
        )
        for model in ("talker", "thinker")
        for effort in EFFORTS
    ],
    *[chat(f"{words_of(off)} to a talker", **off, expect={"content": ANSWER}) for off in OFF],
    *[chat(f"{words_of(on)} to a talker", **on, expect={"content": ANSWER}) for on in ON],
    *[
        chat(
            f"{words_of(off)} to a thinker",
            model="thinker",
            **off,
            messages=[{"role": "user", "content": "think"}],
            expect={"reasoning_content": None},
        )
        for off in OFF
    ],
    *[
        chat(
            f"{words_of(on)} to a thinker",
            model="thinker",
            **on,
            messages=[{"role": "user", "content": "think"}],
            expect=THINKING,
        )
        for on in ON
    ],
    *[
        chat(f"{words_of(effort)} to a {model}", model=model, **effort)
        for model in ("talker", "thinker")
        for effort in EFFORT_WORDS
    ],
    *[
        chat(
            f"a variable that the template of a {model} does not have",
            model=model,
            chat_template_kwargs={"preserve_thinking": True},
        )
        for model in ("talker", "thinker")
    ],
    chat("enable_thinking as a variable to a talker", chat_template_kwargs={"enable_thinking": True}),
    *[chat(f"{name} {value}", **{name: value}) for name, value in OPEN_WEBUI.items()],
    chat("all of Open WebUI's names", **OPEN_WEBUI),
    chat("mirostat that is on", mirostat=2),
    chat(
        "json_object with a schema",
        model="tiny",
        response_format={"type": "json_object", "schema": {"type": "object", "additionalProperties": False}},
        max_tokens=40,
    ),
    chat("max_tokens -1", max_tokens=-1, expect={"content": ANSWER}),
    chat("max_completion_tokens -1", max_completion_tokens=-1, expect={"content": ANSWER}),
    chat("num_predict -1", num_predict=-1, expect={"content": ANSWER}),
    chat("max_tokens 0", max_tokens=0, status=400),
    chat("logit_bias null", logit_bias=None),
    chat("modalities text", modalities=["text"]),
    chat("modalities audio", modalities=["text", "audio"], status=400),
    chat("prediction", prediction={"type": "content", "content": "x"}, expect={"content": ANSWER}),
    chat("web_search_options", web_search_options={}, status=400),
    chat("no tools, tool_choice auto", tools=[], tool_choice="auto"),
    chat("no tools, tool_choice none", tool_choice="none"),
    chat("a tool without its type", tools=[{"function": FUNCTION}]),
    *[
        chat(f"tool_choice {words_of(choice)}", model="tiny", tools=[ADD], tool_choice=choice, max_tokens=9)
        for choice in ({"type": "function", "name": "add"}, {"type": "tool", "name": "add"}, {"type": "any"})
    ],
    chat("functions", functions=[FUNCTION], status=400),
    *[
        chat(f"{name} to a {model}", model=model, messages=messages, tools=[ADD])
        for model in ("talker", "thinker")
        for name, messages in HISTORIES.items()
    ],
    chat("a byte order mark", prefix=b"\xef\xbb\xbf"),
    chat(
        "an answer that is all reasoning",
        model="opener",
        messages=[{"role": "user", "content": "open"}],
        expect={"reasoning_content": "It is a sum. The answer is 42."},
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_llama_path):
    """One server with a key, and a model of each kind. The files of one are damaged wherever it works without."""
    directory = tmp_path_factory.mktemp("models")
    marks = ["<think>", "</think>"]
    thinks = {"think": f"<think>\n{THOUGHT}\n</think>\n\n{FINAL}", "hello": f"<think>\nHm.\n</think>\n\n{ANSWER}"}
    paths = {
        "talker": scripted_model(directory / "talker", {"hello": ANSWER}, context=CONTEXT),
        "thinker": scripted_model(directory / "thinker", thinks, tokens=marks, context=8192),
        "opener": scripted_model(
            directory / "opener",
            {"open": "It is a sum. The answer is 42."},
            generation_prompt="<think>\n",
            tokens=marks,
        ),
        "damaged": damaged(scripted_model(directory / "damaged", {"hello": ANSWER})),
        "tiny": tiny_llama_path,
    }
    models = [flag for key, path in paths.items() for flag in ("--model", f"{key}={path}")]
    with running_server("--no-defaults", *models, "--api-key", KEY, "--log-level", "warning") as server:
        yield server


def damaged(path):
    """The model with wrong values in its files."""
    generation = {"temperature": "hot", "top_p": 0, "top_k": 10**400, "min_p": None, "eos_token_id": ["x", -1, 10**6]}
    (path / "generation_config.json").write_text(json.dumps(generation))
    (path / "special_tokens_map.json").write_text("[]")
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    wrong = {"pad_token": 5, "unk_token": [], "model_max_length": "long"}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer | wrong))
    return path


def ask(server, entry, **headers):
    body = entry.prefix + json.dumps({"model": entry.model, **entry.body}).encode()
    return server.ask("POST", entry.path, body, {"x-api-key": KEY, **entry.headers, **headers})


@pytest.mark.parametrize("entry", [*EVERY_DIALECT, *CHAT_COMPLETIONS])
def test_an_entry_of_the_lists_gets_its_status(server, entry):
    answer = ask(server, entry)
    assert answer.status == entry.status, answer.body
    for name, value in entry.expect.items():
        text = answer.message.get(name)
        assert (text and text.strip()) == value, answer.message


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"Authorization": "Bearer none", "x-api-key": KEY}, 200),
        ({"Authorization": f"Bearer {KEY}", "x-api-key": "none"}, 200),
        ({"x-api-key": "none"}, 401),
        ({}, 401),
    ],
)
def test_a_key_comes_in_either_header(server, headers, status):
    body = json.dumps({"model": "talker", "messages": HELLO})
    assert server.ask("POST", CHAT, body, headers).status == status


@pytest.mark.parametrize("path", [CHAT, BARE])
def test_too_long_a_prompt_is_refused_with_the_code_that_clients_look_for(server, path):
    text = "hello " * CONTEXT
    body = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    answer = ask(server, Entry("too long", body, path=path))
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


def test_too_long_a_prompt_is_refused_with_the_words_that_clients_look_for(server):
    answer = ask(server, Entry("too long", {"messages": [{"role": "user", "content": "hello " * CONTEXT}]}))
    assert f"maximum context length is {CONTEXT} tokens" in answer.error["message"]


def test_a_sampler_that_is_not_here_is_named_in_the_answers_header(server):
    answer = ask(server, Entry("mirostat", {"messages": HELLO, "mirostat": 2, "mirostat_tau": 5.0, "num_ctx": 8192}))
    assert (answer.status, answer.headers["x-ignored-parameters"]) == (200, "mirostat")
    assert (
        ask(server, Entry("off", {"messages": HELLO, **OPEN_WEBUI, "repeat_last_n": 0})).headers["x-ignored-parameters"]
        is None
    )


def test_an_idle_connection_is_promised_to_stay_open_for_a_minute(server):
    promised = ask(server, Entry("idle", {"messages": HELLO})).headers["keep-alive"]
    assert int(promised.partition("timeout=")[2].split(",")[0]) >= 60


def test_models_tell_their_context_under_the_names_of_other_servers(server):
    cards = server.ask("GET", "/v1/models", None, {"x-api-key": KEY}).json["data"]
    assert all(card["max_model_len"] == card["meta"]["n_ctx_train"] == card["context_length"] for card in cards)


def test_a_model_with_damaged_files_answers(server):
    for parameters in ({}, {"temperature": 1.5}, {"stream": True}):
        answer = ask(server, Entry("damaged", {"messages": HELLO, **parameters}, model="damaged"))
        assert answer.status == 200, answer.body
        assert b"friend." in answer.body


def test_unknown_fields_inside_are_ignored_where_that_is_set(scripted_path):
    body = {
        "messages": [{"role": "user", "content": "hello", "foo": 1}],
        "tools": [{**ADD, "bar": 1, "function": {**FUNCTION, "returns": {}}}],
        "tool_choice": {"type": "function", "function": {"name": "add", "x": 1}},
        "max_tokens": 2,
        "baz": 1,
    }
    flags = ("--no-defaults", "--model", f"talker={scripted_path}", "--unknown-parameters", "ignore")
    with running_server(*flags) as server:
        answer = ask(server, Entry("nested", body))
    assert answer.status == 200, answer.body
    ignored = set(answer.headers["x-ignored-parameters"].split(", "))
    assert ignored == {
        "baz",
        "messages%5B0%5D.foo",
        "tools%5B0%5D.bar",
        "tools%5B0%5D.function.returns",
        "tool_choice.function.x",
    }
