"""Every parameter that OpenAI documents is honoured, or refused by its name: here what is understood of each."""

import math
import typing

import jsonschema
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from mlxserver.api.native.apply_template import ApplyTemplateRequest
from mlxserver.api.native.tokenize import DetokenizeRequest, TokenizeRequest
from mlxserver.api.openai.chat import ChatCompletionRequest
from mlxserver.api.openai.completions import CompletionRequest
from mlxserver.api.openai.errors import wire_param
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import ValidationFailed, json_schema, parse
from mlxserver.engine.conversation import Message, Text, Tool
from mlxserver.engine.requests import JsonFormat

HELLO = [{"role": "user", "content": "Hello"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def function(**fields):
    return {"type": "function", "function": fields}


MINIMAL = {
    ChatCompletionRequest: {"model": "m", "messages": HELLO},
    ApplyTemplateRequest: {"model": "m", "messages": HELLO},
    CompletionRequest: {"model": "m", "prompt": "x"},
    TokenizeRequest: {"model": "m", "prompt": "x"},
    DetokenizeRequest: {"model": "m", "tokens": []},
}
NO_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


def read(schema, **parameters):
    return parse(schema, orjson.dumps(MINIMAL[schema] | parameters))


def chat(**parameters):
    return read(ChatCompletionRequest, **parameters)


def complete(**parameters):
    return read(CompletionRequest, **parameters)


def refused(schema=ChatCompletionRequest, **parameters):
    with pytest.raises(ValidationFailed) as caught:
        read(schema, **parameters)
    return caught.value.param


# All that the installed SDK can send

CHAT_VALUES = {
    "model": "m", "messages": HELLO, "frequency_penalty": 1, "presence_penalty": 1, "logit_bias": {"5": 1},
    "logprobs": True, "max_tokens": 5, "max_completion_tokens": 5, "metadata": {"a": "b"}, "modalities": ["text"],
    "n": 2, "parallel_tool_calls": False, "prompt_cache_key": "k", "reasoning_effort": "low",
    "response_format": {"type": "json_object"}, "safety_identifier": "s", "seed": 1, "service_tier": "auto",
    "stop": "x", "store": True, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5,
    "tool_choice": "auto", "tools": [ADD], "top_logprobs": 3, "top_p": 0.5, "user": "u",
}  # fmt: skip
CHAT_REFUSED = {
    "audio": {"voice": "alloy", "format": "wav"}, "function_call": "auto", "functions": [{"name": "f"}],
    "moderation": {"model": "x"}, "prediction": {"type": "content", "content": "x"}, "prompt_cache_options": {},
    "prompt_cache_retention": "24h", "verbosity": "low", "web_search_options": {},
}  # fmt: skip
COMPLETION_VALUES = {
    "model": "m", "prompt": "x", "best_of": 1, "echo": True, "frequency_penalty": 1, "presence_penalty": 1,
    "logit_bias": {"5": 1}, "logprobs": 3, "max_tokens": 5, "n": 1, "seed": 1, "stop": "x", "stream": True,
    "stream_options": {"include_usage": True}, "temperature": 0.5, "top_p": 0.5, "user": "u",
}  # fmt: skip
NEEDS = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}
SURFACES = [
    (chat_create_params, ChatCompletionRequest, CHAT_VALUES, CHAT_REFUSED),
    (completion_create_params, CompletionRequest, COMPLETION_VALUES, {"suffix": "x"}),
]


@pytest.mark.parametrize(("params", "schema", "values", "unsupported"), SURFACES, ids=["chat", "completion"])
def test_every_parameter_of_the_sdk_is_declared_or_refused(params, schema, values, unsupported):
    known = typing.get_type_hints(params.CompletionCreateParamsStreaming)
    assert known.keys() == values.keys() | unsupported.keys()
    for name, value in values.items():
        read(schema, **NEEDS.get(name, {}), **{name: value})
        jsonschema.validate(MINIMAL[schema] | {name: value}, json_schema(schema))
    for name, value in unsupported.items():
        assert refused(schema, **{name: value}) == name


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_what_has_no_effect_is_described_as_such(name):
    for schema in (ChatCompletionRequest, CompletionRequest):
        assert "without effect" in schema.__fields__[name].description


@pytest.mark.parametrize("name", ["audio", "functions", "function_call", "prediction"])
def test_what_is_refused_may_be_null_and_the_error_has_a_remedy(name):
    assert chat(**{name: None}).messages == chat().messages
    with pytest.raises(ValidationFailed, match=f"'{name}' is not supported. .+"):
        chat(**{name: "x"})
    assert json_schema(ChatCompletionRequest)["properties"][name]["type"] == "null"


def test_unknown_parameters_are_ignored_and_noted_where_the_limits_have_that():
    body = orjson.dumps(MINIMAL[ChatCompletionRequest] | {"foo": 1, "audio": {}, "prediction": None, "temperature": 1})
    request = parse(ChatCompletionRequest, body, Limits(ignores_unknown=True))
    assert (request.temperature, request.ignored) == (1.0, ("foo", "audio"))
    assert chat().ignored == ()
    with pytest.raises(ValidationFailed):
        parse(ChatCompletionRequest, orjson.dumps({"model": "m", "foo": 1}), Limits(ignores_unknown=True))


# Chat


@pytest.mark.parametrize(
    ("value", "checked"),
    [("auto", ("auto", None)), ("none", ("none", None)), ("required", ("required", None)),
     ({"type": "function", "function": {"name": "add"}}, ("function", "add"))],
)  # fmt: skip
def test_a_tool_choice_is_a_mode_or_a_name(value, checked):
    assert chat(tools=[ADD], tool_choice=value).tool_choice == checked


def test_tools_come_out_without_nulls():
    null = {"type": "function", "function": {"name": "add", "description": None, "parameters": None, "strict": True}}
    assert chat(tools=[null]).tools == (Tool("add", strict=True, origin="tools[0].function"),)
    assert chat(tools=[]).tools == ()


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": ["add"]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": [function(name="a\n")]}, "tools[0].function.name"),
        ({"tools": [function(name="a", x=1)]}, "tools[0].function.x"),
        ({"tools": [function(name="a", strict=1)]}, "tools[0].function.strict"),
        ({"tools": [function(name="a", parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [ADD, ADD]}, "tools[1].function.name"),
        ({"tools": [ADD] * 300}, "tools"),
        ({"tools": [ADD], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": 5}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "mul"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "schema": []}}, "response_format.schema"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}, "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": 1}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"x": 1}}}, "response_format.json_schema.x"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"min_tokens": 6, "max_completion_tokens": 5}, "min_tokens"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": []}, "modalities"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"reasoning_format": "none"}, "reasoning_format"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"keep_alive": True}, "keep_alive"),
        ({"keep_alive": "5"+"0"*20}, "keep_alive"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"include_obfuscation": 0}}, "stream_options.include_obfuscation"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_at_its_place(wrong, param):
    assert refused(**wrong) == param


def test_a_response_format_is_a_schema_or_none():
    described = {"name": "x", "schema": {"type": "object"}, "strict": True}
    assert chat(response_format={"type": "text"}).response_format is None
    assert chat(response_format={"type": "json_object"}).response_format == JsonFormat(None, "response_format.schema")
    asked = {"type": "json_schema", "json_schema": described}
    expected = JsonFormat({"type": "object"}, "response_format.json_schema.schema")
    assert chat(response_format=asked).response_format == expected
    nameless = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}, "strict": None}}
    assert chat(response_format=nameless).response_format == expected


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_may_stand_beside_the_type(kind):
    """As llama.cpp's server has it, and older versions of clients send it."""
    asked = {"type": kind, "schema": {"type": "object"}}
    assert chat(response_format=asked).response_format == JsonFormat({"type": "object"}, "response_format.schema")


def test_a_last_assistant_message_may_be_continued():
    prefill = [*HELLO, {"role": "assistant", "content": "Well,"}]
    assert chat(messages=prefill, continue_final_message=True).continue_final_message
    asked = read(TokenizeRequest, prompt=None, messages=prefill, continue_final_message=True)
    assert asked.messages[1] == Message("assistant", (Text("Well,"),), "messages[1]")
    assert refused(ApplyTemplateRequest, continue_final_message=True) == "continue_final_message"
    assert refused(TokenizeRequest, continue_final_message=True) == "continue_final_message"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0.0), (2.5, 2.5), ("0", 0.0), ("90", 90.0), ("5m", 300.0), ("1h30m", 5400.0), ("1.5s", 1.5), ("300ms", 0.3),
     (-1, math.inf), ("-1", math.inf), ("-1m", math.inf), (None, None)],
)  # fmt: skip
def test_keep_alive_is_seconds_or_a_duration(value, seconds):
    assert chat(keep_alive=value).keep_alive == seconds


@given(st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63))
def test_any_keep_alive_is_seconds_or_refused(value):
    try:
        assert chat(keep_alive=value).keep_alive >= 0
    except ValidationFailed as error:
        assert error.param == "keep_alive"


def test_stream_options_of_others_are_understood():
    options = {"continuous_usage_stats": True, "include_obfuscation": False, "include_usage": None}
    request = chat(stream=True, stream_options=options)
    assert (request.include_usage, request.counts_pieces) == (True, True)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("prompt.conversation", "messages"),
        ("prompt.template_kwargs.reasoning_effort", "reasoning_effort"),
        ("sampling.logit_bias", "logit_bias"),
        ("messages[2].role", "messages[2].role"),
    ],
)
def test_a_field_of_the_engine_is_named_as_the_client_gave_it(field, param):
    assert wire_param(field) == param


# Bare prompts


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("", [""]), ("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [(1, 2)]), ([[1], [2, 3]], [(1,), (2, 3)])],
)
def test_a_prompt_is_text_or_tokens_one_or_many(prompt, prompts):
    assert complete(prompt=prompt).prompt == prompts


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"x": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["x", 1]}, "prompt[1]"),
        ({"prompt": [[1], "x"]}, "prompt[1]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [[1], [1.5]]}, "prompt[1]"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "logprobs"),
        ({"messages": HELLO}, "messages"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_a_wrong_completion_is_refused_at_its_place(wrong, param):
    assert refused(CompletionRequest, **wrong) == param


def test_a_completion_has_openais_defaults():
    request = complete()
    assert (request.token_limit, request.echo, request.logprobs, request.n) == (16, False, None, 1)


def test_tokens_go_both_ways():
    assert read(DetokenizeRequest, tokens=[1, 2]).tokens == (1, 2)
    assert refused(DetokenizeRequest, tokens=[1, "x"]) == "tokens"
    assert read(TokenizeRequest).prompt == "x"
    assert refused(TokenizeRequest, prompt=None) == "prompt"
    assert refused(TokenizeRequest, messages=HELLO) == "prompt"


PLAIN = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1e6, 1e6) | st.text(max_size=4)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "function", "name", "json_schema", "schema", "strict"]), inner)
    ),
    max_leaves=6,
)
FIELDS = [(schema, name) for schema in MINIMAL for name in schema.__fields__]


@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_is_taken_by_the_published_schema_or_refused(field, value):
    schema, name = field
    try:
        read(schema, **{name: value})
    except ValidationFailed as error:
        assert error.message
        return
    body = {given_: sent for given_, sent in (MINIMAL[schema] | {name: value}).items() if sent is not None}
    jsonschema.validate(body, json_schema(schema), jsonschema.Draft202012Validator)
