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
from mlxserver.engine.requests import NO_LIMIT, JsonFormat

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
    "prediction": {"type": "content", "content": "x"}, "prompt_cache_options": {}, "prompt_cache_retention": "24h",
    "verbosity": "low",
}  # fmt: skip
CHAT_REFUSED = {
    "audio": {"voice": "alloy", "format": "wav"}, "function_call": "auto", "functions": [{"name": "f"}],
    "moderation": {"model": "x"}, "web_search_options": {},
}  # fmt: skip
COMPLETION_VALUES = {
    "model": "m", "prompt": "x", "best_of": 1, "echo": True, "frequency_penalty": 1, "presence_penalty": 1,
    "logit_bias": {"5": 1}, "logprobs": 3, "max_tokens": 5, "n": 1, "seed": 1, "stop": "x", "stream": True,
    "stream_options": {"include_usage": True}, "temperature": 0.5, "top_p": 0.5, "user": "u", "suffix": "x",
}  # fmt: skip
NEEDS = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}
SURFACES = [
    (chat_create_params, ChatCompletionRequest, CHAT_VALUES, CHAT_REFUSED),
    (completion_create_params, CompletionRequest, COMPLETION_VALUES, {}),
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


ANYTHING = [None, True, 0, 1.5, "x", [], ["x"], {}, {"type": "ephemeral", "x": [1]}]


@pytest.mark.parametrize("schema", [ChatCompletionRequest, CompletionRequest])
def test_what_programs_send_unasked_is_accepted_with_any_value(schema):
    described = json_schema(schema)["properties"]
    validator = jsonschema.Draft202012Validator(json_schema(schema))
    assert {"cache_control", "include", "verbosity", "client_metadata", "num_ctx"} <= schema.__no_effect__.keys()
    for name in schema.__no_effect__:
        assert described[name]["description"].startswith("Accepted without effect: ")
        for value in ANYTHING:
            assert read(schema, **{name: value}).ignored == ()
            validator.validate(MINIMAL[schema] | {name: value})


@pytest.mark.parametrize(
    ("given_", "ignored"),
    [({"mirostat": 0}, ()), ({"mirostat": None, "mirostat_tau": 5}, ()), ({"tfs_z": 1}, ()),
     ({"mirostat": 2, "mirostat_tau": 5}, ("mirostat",)), ({"tfs_z": 0.5, "typical_p": 0.9}, ("tfs_z", "typical_p"))],
)  # fmt: skip
def test_a_sampler_of_another_server_is_noted_unless_it_is_off(given_, ignored):
    assert chat(**given_).ignored == complete(**given_).ignored == ignored
    jsonschema.validate(MINIMAL[ChatCompletionRequest] | given_, json_schema(ChatCompletionRequest))


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_what_has_no_effect_is_described_as_such(name):
    for schema in (ChatCompletionRequest, CompletionRequest):
        assert "without effect" in schema.__fields__[name].description


@pytest.mark.parametrize("name", ["audio", "functions", "function_call"])
def test_what_is_refused_may_be_null_and_the_error_has_a_remedy(name):
    assert chat(**{name: None}).messages == chat().messages
    with pytest.raises(ValidationFailed, match=f"'{name}' is not supported. .+"):
        chat(**{name: "x"})
    assert json_schema(ChatCompletionRequest)["properties"][name]["type"] == "null"


def test_unknown_parameters_are_ignored_and_noted_where_the_limits_have_that():
    body = orjson.dumps(MINIMAL[ChatCompletionRequest] | {"foo": 1, "audio": {}, "functions": None, "temperature": 1})
    request = parse(ChatCompletionRequest, body, Limits(ignores_unknown=True))
    assert (request.temperature, request.ignored) == (1.0, ("foo", "audio"))
    assert chat().ignored == ()
    with pytest.raises(ValidationFailed):
        parse(ChatCompletionRequest, orjson.dumps({"model": "m", "foo": 1}), Limits(ignores_unknown=True))


TOOL_WITH_EXTRAS = {**ADD, "defer_loading": True, "cache_control": {}, "strict": True}
MESSAGE_WITH_EXTRAS = {**HELLO[0], "cache_control": {"type": "ephemeral"}}


def test_hints_to_a_cache_are_accepted_anywhere():
    hinted = {"type": "function", "function": ADD["function"] | {"cache_control": {}, "eager_input_streaming": True}}
    plain = chat(tools=[ADD])
    for tool in (TOOL_WITH_EXTRAS, hinted):
        request = chat(tools=[tool], messages=[MESSAGE_WITH_EXTRAS])
        assert (request.tools, request.messages, request.ignored) == (plain.tools, plain.messages, ())
    part = {"type": "text", "text": "Hello", "cache_control": {}}
    assert chat(messages=[{"role": "user", "content": [part]}]).messages == plain.messages


def test_a_property_of_a_tool_is_never_taken_for_a_hint():
    parameters = {"type": "object", "properties": {"cache_control": {"type": "string"}}, "cache_control": 1}
    assert chat(tools=[function(name="f", parameters=parameters)]).tools[0].parameters == parameters


def test_unknown_fields_inside_are_ignored_and_noted_where_the_limits_have_that():
    described = {"schema": {"type": "object", "z": 3}}
    asked = {
        "messages": [{**HELLO[0], "foo": 1}],
        "tools": [{**TOOL_WITH_EXTRAS, "function": {**ADD["function"], "returns": {}}}],
        "tool_choice": {"type": "function", "function": {"name": "add", "x": 1}, "y": 2},
        "response_format": {"type": "json_schema", "json_schema": {**described, "a": 1}},
    }
    request = parse(
        ChatCompletionRequest, orjson.dumps(MINIMAL[ChatCompletionRequest] | asked), Limits(ignores_unknown=True)
    )
    assert set(request.ignored) == {
        "messages[0].foo",
        "tools[0].function.returns",
        "tool_choice.function.x",
        "tool_choice.y",
        "response_format.json_schema.a",
    }
    assert (request.tools, request.tool_choice) == (chat(tools=[ADD]).tools, ("function", "add"))
    known = chat(response_format={"type": "json_schema", "json_schema": described})
    assert request.response_format == known.response_format
    for name, value in asked.items():
        assert refused(**{"tools": [ADD], name: value}).startswith(name)


# Chat


@pytest.mark.parametrize(
    ("given_", "limit"),
    [({}, None), ({"max_tokens": -1}, NO_LIMIT), ({"max_completion_tokens": -1}, NO_LIMIT),
     ({"max_tokens": -1, "num_predict": 7}, 7),
     ({"num_predict": -2}, NO_LIMIT), ({"num_predict": 7}, 7), ({"max_tokens": 7, "num_predict": 7}, 7)],
)  # fmt: skip
def test_a_token_limit_of_minus_one_is_the_end_of_the_context(given_, limit):
    assert chat(**given_).token_limit == limit
    jsonschema.validate(MINIMAL[ChatCompletionRequest] | given_, json_schema(ChatCompletionRequest))


def test_repeat_penalty_is_repetition_penalty():
    assert chat(repeat_penalty=1.1).sampling == complete(repeat_penalty=1.1).sampling == {"repetition_penalty": 1.1}
    assert chat(repeat_penalty=1.1, repetition_penalty=1.1).sampling == {"repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("given_", "template_kwargs", "budget"),
    [
        ({}, {}, None),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}, None),
        ({"reasoning_effort": "High"}, {"reasoning_effort": "high"}, None),
        ({"reasoning_effort": "a lot"}, {"reasoning_effort": "a lot"}, None),
        ({"reasoning_effort": "default"}, {}, None),
        ({"enable_thinking": False}, {"enable_thinking": False}, None),
        ({"enable_thinking": True}, {}, None),
        ({"enable_thinking": False, "reasoning_effort": "high"}, {"enable_thinking": False}, None),
        ({"think": False}, {"enable_thinking": False}, None),
        ({"think": True}, {}, None),
        ({"think": "low"}, {"reasoning_effort": "low"}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, {}, 2048),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, {}, None),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, {}, None),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}, None),
        ({"thinking": False}, {"enable_thinking": False}, None),
        ({"reasoning": {}}, {}, None),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"reasoning_effort": "high"}, None),
        ({"reasoning": {"effort": None, "max_tokens": 99, "exclude": True}}, {}, 99),
        ({"reasoning": {"enabled": False}}, {"enable_thinking": False}, None),
        ({"reasoning": {"effort": "none", "enabled": False}}, {"enable_thinking": False}, None),
        ({"thinking_budget": -1}, {}, None),
        ({"thinking_budget": 7, "reasoning": {"max_tokens": 7}}, {}, 7),
        (
            {"think": False, "chat_template_kwargs": {"enable_thinking": True, "x": 1}},
            {"enable_thinking": True, "x": 1},
            None,
        ),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            {"reasoning_effort": "high"},
            None,
        ),
    ],
)
def test_thinking_is_switched_under_all_its_names(given_, template_kwargs, budget):
    request = chat(**given_)
    assert request.chat_prompt(request.messages).template_kwargs == template_kwargs
    assert request.switches.budget == budget
    jsonschema.validate(MINIMAL[ChatCompletionRequest] | given_, json_schema(ChatCompletionRequest))


def test_a_prompt_is_shown_with_the_switches_that_it_would_be_answered_with():
    for schema in (ApplyTemplateRequest, TokenizeRequest):
        request = (
            read(schema, prompt=None, messages=HELLO, think=False)
            if schema is TokenizeRequest
            else read(schema, think=False)
        )
        assert request.chat_prompt(request.messages).template_kwargs == {"enable_thinking": False}
        assert refused(TokenizeRequest, think=False, reasoning={"enabled": True}) == "think"


@pytest.mark.parametrize(
    ("value", "checked"),
    [("auto", ("auto", None)), ("none", ("none", None)), ("required", ("required", None)),
     ({"type": "function", "function": {"name": "add"}}, ("function", "add")),
     ({"function": {"name": "add"}}, ("function", "add")), ({"type": "function", "name": "add"}, ("function", "add")),
     ({"type": "tool", "name": "add"}, ("function", "add")), ({"type": "any"}, ("required", None)),
     ({"type": "auto"}, ("auto", None)), ({"type": "none"}, ("none", None))],
)  # fmt: skip
def test_a_tool_choice_is_a_mode_or_a_name(value, checked):
    assert chat(tools=[ADD], tool_choice=value).tool_choice == checked


def test_tools_come_out_without_nulls():
    null = {"type": "function", "function": {"name": "add", "description": None, "parameters": None, "strict": True}}
    assert chat(tools=[null]).tools == (Tool("add", strict=True, origin="tools[0].function"),)
    assert chat(tools=[]).tools == chat(tools=[], tool_choice="auto").tools == chat(tool_choice="none").tools == ()


def test_the_type_of_a_tool_may_be_left_out():
    for tool in ({"function": ADD["function"]}, {**ADD, "type": None}):
        assert chat(tools=[tool]).tools == chat(tools=[ADD]).tools
        jsonschema.validate(MINIMAL[ChatCompletionRequest] | {"tools": [tool]}, json_schema(ChatCompletionRequest))


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": ["add"]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].function"),
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
        ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice.type"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "a b"}}, "tool_choice.name"),
        ({"tools": [ADD], "tool_choice": {"type": "any", "name": "add"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
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
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"enable_thinking": "yes"}, "enable_thinking"),
        ({"think": 5}, "think"),
        ({"thinking": {}}, "thinking.type"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": -2}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "x": 1}}, "thinking.x"),
        ({"reasoning": "low"}, "reasoning"),
        ({"reasoning": {"max_tokens": 1.5}}, "reasoning.max_tokens"),
        ({"reasoning": {"effort": "none", "enabled": True}}, "reasoning.effort"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "reasoning_effort"),
        ({"think": False, "thinking": {"type": "enabled"}}, "think"),
        ({"thinking_budget": 5, "thinking": {"type": "enabled", "budget_tokens": 6}}, "thinking"),
        ({"num_predict": 0}, "num_predict"),
        ({"num_predict": 3, "max_tokens": 4}, "max_tokens"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"reasoning_format": "none"}, "reasoning_format"),
        ({"thinking_budget": -2}, "thinking_budget"),
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
        ({"messages": HELLO}, "messages"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"num_predict": 0}, "num_predict"),
        ({"max_tokens": False}, "max_tokens"),
        ({"max_tokens": 0, "min_tokens": 1}, "min_tokens"),
        ({"max_tokens": 5, "num_predict": 6}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"suffix": 1}, "suffix"),
        ({"suffix": "x", "prompt": [1, 2]}, "suffix"),
        ({"suffix": "x", "echo": True, "logprobs": 1}, "suffix"),
    ],
)
def test_a_wrong_completion_is_refused_at_its_place(wrong, param):
    assert refused(CompletionRequest, **wrong) == param


def test_a_completion_has_openais_defaults():
    request = complete()
    assert (request.token_limit, request.echo, request.logprobs, request.n) == (16, False, None, 1)
    assert [complete(max_tokens=-1).token_limit, complete(num_predict=-1).token_limit] == [NO_LIMIT] * 2
    assert (complete(num_predict=20).token_limit, complete(max_tokens=5).token_limit) == (20, 5)
    assert complete(max_tokens=0).token_limit == 0


def test_an_echo_with_logprobs_has_the_prompt_scored():
    assert complete(logprobs=2).scored is complete(echo=True).scored is None
    assert (complete(logprobs=2, echo=True).scored, complete(prompt_logprobs=0).scored) == (2, 0)
    assert complete(logprobs=2, echo=True, prompt_logprobs=5).scored == 5


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
