"""Ollama's dialect without a server: what requests mean, and lines that the SDK's own types take."""

import json
import math

import ollama
import orjson
import pytest

from mlxserver.api.dialect import Failure
from mlxserver.api.model_status import ModelStatus, Progress
from mlxserver.api.ollama.encoder import LineEncoder
from mlxserver.api.ollama.generation import OllamaChatDialect, OllamaGenerateDialect
from mlxserver.api.ollama.models import OllamaShowRequest, running, shown, tags
from mlxserver.api.ollama.names import name_of, names_of
from mlxserver.api.ollama.pull import OllamaPullRequest, PullEncoder
from mlxserver.api.schema.parameters import ValidationFailed, parse
from mlxserver.config.settings import Settings
from mlxserver.engine.conversation import Message, Reasoning, Text, ToolCall, ToolResult
from mlxserver.engine.description import Description
from mlxserver.engine.events import Delta, Finish, PrefillProgress, Timings, TokenLogprob, ToolCallDelta, Usage
from mlxserver.engine.requests import NO_LIMIT, ChatPrompt, FillPrompt, JsonFormat, TextPrompt
from tests.support.published import check

HELLO = [{"role": "user", "content": "Hello"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
USAGE = Usage(7, 5, timings=Timings(0.1, 0.2, 0.3))
SETTINGS = Settings()


def call_of(dialect=OllamaChatDialect, settings=SETTINGS, **body):
    return dialect(settings).parse(orjson.dumps({"model": "m", **body}))


def chat(**body):
    return call_of(**{"messages": HELLO, **body}).requests[0]


def generate(**body):
    return call_of(OllamaGenerateDialect, **{"prompt": "Hello", **body}).requests[0]


def refused(dialect=OllamaChatDialect, settings=SETTINGS, **body):
    with pytest.raises(ValidationFailed) as caught:
        call_of(dialect, settings, **body)
    return caught.value


# Requests


def test_a_stream_is_the_default_and_latest_need_not_be_written():
    call = call_of(model="m:latest", messages=HELLO)
    assert (call.model, call.other_names, call.streams, call.idle_timeout) == ("m", ["m:latest"], True, None)
    assert not call_of(messages=HELLO, stream=False).streams
    assert [names_of(name) for name in ("m", "m:latest", "m:7b")] == [("m",), ("m", "m:latest"), ("m:7b",)]
    assert [name_of(key) for key in ("m", "org/m", "m:7b", "m:latest")] == [
        "m:latest",
        "org/m:latest",
        "m:7b",
        "m:latest",
    ]


def test_options_are_the_sampling_the_stops_and_the_limit():
    options = {
        "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 7, "repeat_penalty": 1.1,
        "frequency_penalty": 0.5, "presence_penalty": -0.5, "num_predict": 9, "stop": ["a", "b"],
    }  # fmt: skip
    request = chat(options=options)
    assert request.sampling == {
        "temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 7, "repetition_penalty": 1.1,
        "frequency_penalty": 0.5, "presence_penalty": -0.5,
    }  # fmt: skip
    assert (request.max_tokens, request.stop) == (9, ("a", "b"))
    assert generate(options=options).sampling == request.sampling


@pytest.mark.parametrize("limit", [0, -1, -2])
def test_what_is_no_limit_or_no_seed_there_is_none_here(limit):
    request = chat(options={"num_predict": limit, "seed": -1})
    assert (request.max_tokens, request.sampling) == (NO_LIMIT, {})


def test_every_option_of_the_sdk_is_taken_and_what_is_not_applied_is_named():
    wrong = {"mirostat": 2, "tfs_z": 0.5, "typical_p": 0.7, "repeat_last_n": 64, "penalize_newline": False}
    names = {*ollama.Options.model_fields, "num_gqa", "rope_frequency_base", "rope_frequency_scale"}
    given = dict.fromkeys(names - wrong.keys(), 1) | {"stop": ["a"]} | wrong
    assert {*call_of(messages=HELLO, options=given).ignored} == {f"options.{name}" for name in wrong}
    given = {"mirostat": 0, "tfs_z": 1.0, "typical_p": 1.0, "repeat_last_n": -1, "penalize_newline": True}
    assert call_of(messages=HELLO, options=given).ignored == ()


def test_wrong_and_unknown_options_are_refused_by_name():
    assert refused(messages=HELLO, options={"temperature": 5}).param == "options.temperature"
    assert refused(messages=HELLO, options={"num_predict": -3}).param == "options.num_predict"
    assert refused(messages=HELLO, options={"foo": 5}).param == "options.foo"
    assert refused(messages=HELLO, options=[]).param == "options"
    assert refused(messages=HELLO, options={"stop": ["a"] * 17}).param == "options.stop"
    lenient = Settings(unknown_parameters="ignore")
    assert call_of(settings=lenient, messages=HELLO, options={"foo": 5}, bar=1).ignored == ("bar", "options.foo")


@pytest.mark.parametrize(
    ("think", "variables"),
    [(True, {}), (False, {"enable_thinking": False}), ("low", {"reasoning_effort": "low"}), (None, {})],
)
def test_think_is_a_switch_or_an_effort(think, variables):
    assert chat(think=think).prompt.template_kwargs == variables
    assert generate(think=think).prompt.template_kwargs == variables


def test_format_is_json_or_a_schema():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat(format="json").format == JsonFormat(None, "format")
    assert chat(format=schema).format == JsonFormat(schema, "format")
    assert chat(format="").format is None
    assert refused(messages=HELLO, format="yaml").param == "format"


@pytest.mark.parametrize(("keep_alive", "seconds"), [(0, 0), ("5m", 300), (-1, math.inf), ("-1m", math.inf), (90, 90)])
def test_keep_alive_is_seconds_or_a_duration(keep_alive, seconds):
    assert call_of(messages=HELLO, keep_alive=keep_alive).idle_timeout == seconds


def test_a_conversation_with_calls_by_name_and_without_ids():
    conversation = [
        {"role": "system", "content": "s", "images": []},
        {"role": "user", "content": "u", "images": None},
        {"role": "assistant", "content": "", "thinking": "t",
         "tool_calls": [{"function": {"index": 0, "name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3", "tool_name": "add"},
        {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    request = chat(messages=conversation, tools=[ADD])
    assert [(message.role, message.parts) for message in request.prompt.conversation] == [
        ("system", (Text("s"),)),
        ("user", (Text("u"),)),
        ("assistant", (Reasoning("t"), ToolCall("", "add", {"a": 1}))),
        ("tool", (ToolResult("", "3", "add"),)),
        ("assistant", (Text("a"),)),
    ]
    assert [tool.name for tool in request.prompt.tools] == ["add"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("x", "messages"),
        (["x"], "messages[0]"),
        ([{"role": "robot"}], "messages[0].role"),
        ([{"role": "user", "content": "x", "images": ["aGk"]}], "messages[0].images[0]"),
        ([{"role": "user", "content": "x", "images": "aGk="}], "messages[0].images"),
        ([{"role": "assistant", "content": "x", "images": ["aGk="]}], "messages[0].images"),
        ([*HELLO, {"role": "assistant", "thinking": 5}], "messages[1].thinking"),
        ([{"role": "tool", "content": "x", "tool_name": 5}], "messages[0].tool_name"),
    ],
)
def test_a_wrong_message_is_named(messages, param):
    error = refused(messages=messages)
    assert error.param == param
    assert f"'{param}'" in error.message


def test_an_unknown_field_of_a_message_is_refused_or_where_that_is_set_noted():
    messages = [{"role": "user", "content": "x", "foo": 1}, {"role": "assistant", "content": "y", "bar": 1}]
    assert refused(messages=messages).param == "messages[0].foo"
    call = call_of(settings=Settings(unknown_parameters="ignore"), messages=messages)
    assert call.ignored == ("messages[0].foo",)


def test_a_prompt_is_a_chat_of_one_message_or_raw_text():
    request = generate(system="Be brief.")
    assert request.prompt == ChatPrompt(
        (Message("system", (Text("Be brief."),), "system"), Message("user", (Text("Hello"),), "prompt"))
    )
    assert generate(raw=True).prompt == TextPrompt("Hello")
    assert generate(suffix="there").prompt == FillPrompt("Hello", "there")
    assert generate(prompt="", suffix="there").prompt == FillPrompt("", "there")


@pytest.mark.parametrize(
    ("name", "value"),
    [("template", "{{ .Prompt }}"), ("context", [1, 2]), ("width", 5)],
)
def test_what_is_not_supported_is_refused_by_name_and_an_empty_value_is_taken(name, value):
    error = refused(OllamaGenerateDialect, prompt="x", **{name: value})
    assert error.param == name
    assert f"'{name}'" in error.message
    generate(**{name: None})
    if name != "width":
        generate(**{name: type(value)()})


@pytest.mark.parametrize(("dialect", "field"), [(OllamaChatDialect, "messages"), (OllamaGenerateDialect, "prompt")])
def test_without_a_question_the_model_is_loaded_or_unloaded(dialect, field):
    for empty in ({}, {field: [] if field == "messages" else ""}, {field: None}):
        for keep_alive, reason in ((None, "load"), (60, "load"), (0, "unload")):
            call = call_of(dialect, **empty, keep_alive=keep_alive)
            assert (call.requests, call.idle_timeout) == ([], keep_alive)
            assert json.loads(call.encoder.complete([], Usage(0, 0)))["done_reason"] == reason


def test_a_model_has_two_names_in_requests_about_models():
    for body in ({"model": "m"}, {"name": "m"}, {"model": "m", "name": "m"}, {"model": "", "name": "m"}):
        assert parse(OllamaShowRequest, orjson.dumps(body)).asked == "m"
    for body in ({}, {"model": ""}, {"model": "m", "name": "n"}):
        with pytest.raises(ValidationFailed):
            parse(OllamaShowRequest, orjson.dumps(body))


@pytest.mark.parametrize(
    ("name", "key", "source"),
    [
        ("org/m", "org/m", "org/m"),
        ("hf.co/org/m:latest", "hf.co/org/m", "org/m"),
        ("https://huggingface.co/org/M-4bit@main", "m-4bit-main", "org/M-4bit@main"),
    ],
)
def test_a_pulled_model_has_the_name_that_was_asked_for(name, key, source):
    spec = parse(OllamaPullRequest, orjson.dumps({"name": name})).spec
    assert (spec.key, spec.source) == (key, source)


# Answers


def encoder(is_chat=True, **options):
    return LineEncoder("m:latest", is_chat=is_chat, **options)


def lines_of(events, is_chat=True, **options):
    one = encoder(is_chat, **options)
    stream = one.start(7) + b"".join(one.event(event, 0) for event in events) + one.end(USAGE)
    types = ollama.ChatResponse if is_chat else ollama.GenerateResponse
    lines = stream.decode().splitlines()
    for line in lines:
        check(json.loads(line), "OllamaChat" if is_chat else "OllamaGenerate")
        types.model_validate_json(line, strict=True)
    return [json.loads(line) for line in lines]


def whole(events, is_chat=True, **options):
    body = encoder(is_chat, **options).complete([events], USAGE)
    (ollama.ChatResponse if is_chat else ollama.GenerateResponse).model_validate_json(body, strict=True)
    return check(json.loads(body), "OllamaChat" if is_chat else "OllamaGenerate")


THOUGHT = [Delta("Hm", "reasoning"), Delta("m.", "reasoning"), Delta("Yes"), Delta(" sir"), Finish("stop")]
CALLS = [
    ToolCallDelta(0, '{"a"', "c0", "add"),
    ToolCallDelta(0, ":\n 123456789012345678901234567890}"),
    ToolCallDelta(1, "", "c1", "now"),
    Finish("tool_calls"),
]


def test_text_and_reasoning_have_their_fields():
    lines = lines_of(THOUGHT)
    assert [line["message"] for line in lines] == [
        {"role": "assistant", "content": "", "thinking": "Hm"},
        {"role": "assistant", "content": "", "thinking": "m."},
        {"role": "assistant", "content": "Yes"},
        {"role": "assistant", "content": " sir"},
        {"role": "assistant", "content": ""},
    ]
    assert [line["done"] for line in lines] == [False] * 4 + [True]
    assert whole(THOUGHT)["message"] == {"role": "assistant", "content": "Yes sir", "thinking": "Hmm."}
    lines = lines_of(THOUGHT, is_chat=False)
    assert [(line["response"], line.get("thinking")) for line in lines] == [
        ("", "Hm"), ("", "m."), ("Yes", None), (" sir", None), ("", None),
    ]  # fmt: skip
    answer = whole(THOUGHT, is_chat=False)
    assert (answer["response"], answer["thinking"]) == ("Yes sir", "Hmm.")


def test_the_last_line_has_counts_and_durations_in_nanoseconds():
    for last in (lines_of(THOUGHT)[-1], whole(THOUGHT)):
        assert (last["done"], last["done_reason"], last["model"]) == (True, "stop", "m:latest")
        assert (last["prompt_eval_count"], last["eval_count"]) == (7, 5)
        assert (last["prompt_eval_duration"], last["eval_duration"]) == (200_000_000, 300_000_000)
        assert last["total_duration"] >= 0


def test_a_call_is_one_line_with_its_arguments_as_an_object():
    calls = [
        {"id": "c0", "function": {"index": 0, "name": "add", "arguments": {"a": 123456789012345678901234567890}}},
        {"id": "c1", "function": {"index": 1, "name": "now", "arguments": {}}},
    ]
    lines = lines_of(CALLS)
    assert [line["message"].get("tool_calls") for line in lines] == [[calls[0]], [calls[1]], None]
    assert lines[-1]["done_reason"] == "stop"
    assert whole(CALLS)["message"]["tool_calls"] == calls


@pytest.mark.parametrize("text", ['{"a": ', "[1]", '{"a": NaN}', '{"a": "\\ud800"}', "nonsense"])
def test_arguments_that_are_no_object_are_passed_as_text(text):
    (first, _) = lines_of([ToolCallDelta(0, text, "c", "f"), Finish("length")])
    assert first["message"]["tool_calls"][0]["function"]["arguments"] == {"arguments": text}


def test_a_call_between_texts_keeps_its_place():
    lines = lines_of([Delta("a"), ToolCallDelta(0, "{}", "c", "f"), Delta("b"), Finish("stop")])
    kinds = ["call" if "tool_calls" in line["message"] else line["message"]["content"] for line in lines]
    assert kinds == ["a", "call", "b", ""]


def test_logprobs_are_beside_the_text():
    token = TokenLogprob("Yes", b"Yes", -0.5, (TokenLogprob("No", b"No", -1.0),))
    events = [Delta("Yes", logprobs=(token,)), Finish("stop")]
    for answer in (lines_of(events, has_logprobs=True)[0], whole(events, has_logprobs=True)):
        (stated,) = answer["logprobs"]
        assert (stated["token"], stated["logprob"], stated["top_logprobs"][0]["token"]) == ("Yes", -0.5, "No")


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_heartbeat_is_a_line_without_text(is_chat):
    line = encoder(is_chat).heartbeat(PrefillProgress(1, 2))
    answer = check(json.loads(line), "OllamaChat" if is_chat else "OllamaGenerate")
    assert (answer.get("response", answer.get("message", {}).get("content")), answer["done"]) == ("", False)
    assert line.endswith(b"\n")


def test_a_failure_is_a_line_with_an_error():
    assert encoder().failed(Failure("No.", "server")) == b'{"error":"No."}\n'


def test_a_pull_is_lines_of_its_progress():
    pull = PullEncoder("org/m")
    lines = [
        pull.start(),
        pull.progress(Progress("waiting")),
        pull.progress(Progress("downloading", 5, 10)),
        pull.heartbeat(),
        pull.progress(Progress("reading", 1, 2)),
        pull.loaded(ModelStatus("m", 1, "loaded", "org/m")),
    ]
    found = [ollama.ProgressResponse.model_validate_json(check_line(line), strict=True) for line in lines]
    assert [step.status for step in found[:2]] == ["pulling manifest", "waiting"]
    assert (found[2].completed, found[2].total, found[2].digest[:7]) == (5, 10, "sha256:")
    assert found[3] == found[2]
    assert (found[4].digest, found[5].status) == (None, "success")


def check_line(line):
    check(json.loads(line), "OllamaProgress")
    return line


def test_models_are_described_as_the_sdk_takes_them():
    status = ModelStatus(
        "m", 5, "loaded", "org/m", type="thinking", context_length=4096, reserved_bytes=9, expires_in=60
    )
    known = Description("llama", 134_515_008, "Q4", 8192, 30, 9, 3, 576, 49152, 75_000_000, "{{ x }}", 7.5)
    for description in (known, Description()):
        listed = check(tags([("m", status, description)]), "OllamaTags")
        ollama.ListResponse.model_validate_json(json.dumps(listed), strict=True)
        loaded = check(running([(status, description)], 0.0), "OllamaRunning")
        ollama.ProcessResponse.model_validate_json(json.dumps(loaded), strict=True)
        described = check(shown(status, description, [("top_p", 0.5)]), "OllamaShown")
        ollama.ShowResponse.model_validate_json(json.dumps(described), strict=True)
        assert loaded["models"][0]["expires_at"] == "1970-01-01T00:01:00.000000Z"
        assert described["capabilities"] == ["completion", "tools", "thinking"]
        assert described["parameters"] == "top_p 0.5"
    assert listed["models"][0]["size"] == 0
    described = shown(status, known, [])
    assert described["model_info"]["llama.context_length"] == 4096  # what is served
    assert (described["details"]["parameter_size"], described["details"]["quantization_level"]) == ("134.5M", "Q4")
