"""A request is honoured or refused with the name of what is wrong; nothing is dropped, and nothing crashes."""

import dataclasses
import json
import math

import jsonschema
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.api.native.load import LoadRequest, derive_key
from mlxserver.api.native.unload import UnloadRequest
from mlxserver.api.openai.chat import ChatCompletionRequest
from mlxserver.api.schema.parameters import ValidationFailed, json_schema, parse
from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.conversation import Message, Reasoning, Text, ToolCall, ToolResult

HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def calling(arguments):
    return {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": arguments}}]}


SAMPLING = [
    "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias",
    "frequency_penalty", "presence_penalty", "repetition_penalty",
]  # fmt: skip
FIELDS = sorted(ChatCompletionRequest.__fields__)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "7"]), inner),
    max_leaves=8,
)  # fmt: skip


def chat(**parameters):
    body = {"model": "m", "messages": HELLO, **parameters}
    return parse(ChatCompletionRequest, orjson.dumps(body))


def refusal(schema, body):
    with pytest.raises(ValidationFailed) as caught:
        parse(schema, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.message and "\n" not in caught.value.message
    return caught.value


def refused(**parameters):
    return refusal(ChatCompletionRequest, {"model": "m", "messages": HELLO, **parameters})


def messages(*conversation):
    return chat(messages=list(conversation)).messages


def test_the_least_request_has_every_default():
    request = chat()
    assert (request.model, request.messages) == ("m", (Message("user", (Text("Hello"),), "messages[0]"),))
    assert {getattr(request, name) for name in SAMPLING} == {None}  # the model's defaults hold
    assert (request.token_limit, request.min_tokens, request.stop, request.ignore_eos) == (None, 0, (), False)
    assert (request.tools, request.tool_choice, request.response_format) == ((), ("auto", None), None)
    assert (request.stream, request.include_usage, request.n) == (False, False, 1)


def test_everything_given_arrives():
    given_ = {
        "max_tokens": 5, "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": -(2**63),
        "frequency_penalty": -2, "presence_penalty": 2, "repetition_penalty": 1.1, "stream": True,
    }  # fmt: skip
    request = chat(**given_, stop="end", logit_bias={"7": -100}, stream_options={"include_usage": True})
    assert {name: getattr(request, name) for name in given_} == given_
    assert (request.stop, request.logit_bias, request.include_usage) == (("end",), {7: -100.0}, True)


def test_types_are_those_that_the_engine_expects():
    request = chat(temperature=1, max_tokens=5.0, logit_bias={"7": 1})
    assert [type(v) for v in (request.temperature, request.max_tokens, request.logit_bias[7])] == [float, int, float]


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("model", "messages")])
def test_null_is_the_default(name):
    assert getattr(chat(**{name: None}), name) == getattr(chat(), name)


def test_defaults_are_not_shared():
    chat().chat_template_kwargs["x"] = 1
    assert (chat().chat_template_kwargs, chat().tools) == ({}, ())


@pytest.mark.parametrize("name", ["model", "messages"])
def test_what_is_required_is_missed(name):
    complete = {"model": "m", "messages": HELLO}
    for body in (complete | {name: None}, {other: value for other, value in complete.items() if other != name}):
        error = refusal(ChatCompletionRequest, body)
        assert (error.param, error.message) == (name, f"Missing required parameter: '{name}'.")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", [5, True, ["m"], {}]),
        ("temperature", [-0.1, 2.1, 3, "1", True, [], {}, 1e308]),
        ("top_p", [0, -1, 1.01, "x"]),
        ("top_k", [-2, 1.5, "5", False]),
        ("min_p", [-0.1, 1.1]),
        ("seed", [1.5, "1", 2**63, 2**64 - 1, 1e300, True]),
        ("max_tokens", [0, -3, 1.5, "5", True, 2**64 - 1, 10**30]),
        ("max_completion_tokens", [0, -5]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0, -1, 101, 1e300]),
        ("logit_bias", [[], "x", {"a": 1}, {"-1": 1}, {"٥": 1}, {"": 1}, {"9" * 5000: 1}]),
        ("logit_bias.7", [{"7": 101}, {"7": "1"}, {"7": True}, {"7": None}]),
        ("stop", ["", 5, {}, ["a"] * 1025]),
        ("stop[1]", [["a", ""], ["a", 5], ["a", None]]),
        ("stream", [1, 0, "true"]),
        ("stream_options", [True, [], "x"]),
        ("stream_options.include_usage", [{"include_usage": 1}, {"include_usage": "true"}]),
        ("stream_options.foo", [{"foo": True}]),
        ("n", [0, 129, "1"]),
        ("user", [5]),
        ("metadata", ["x", []]),
        ("store", ["x", 1]),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, values):
    parameter = name.split(".")[0].split("[")[0]
    assert [
        refused(**{parameter: value}, **({"stream": True} if "stream_" in name else {})).param for value in values
    ] == [name for _ in values]


def test_an_error_names_value_and_expectation():
    assert (
        refused(temperature=3).message
        == "Invalid value for 'temperature': 3. Expected a number at least 0 and at most 2."
    )
    assert refused(n=129).message == "Invalid value for 'n': 129. Expected an integer at least 1 and at most 128."
    assert refused(stream="yes").message == "Invalid value for 'stream': 'yes'. Expected true or false."


def test_an_error_is_short_however_long_the_value():
    assert len(refused(temperature="x" * 10_000).message) < 200
    assert len(refused(**{"x" * 10_000: 1}).param) < 100


@pytest.mark.parametrize("name", ["foo", "max_token", "self", "cls", "__class__", ""])
@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_parameter_is_refused(name, value):
    error = refused(**{name: value}) if name != "self" else refusal(ChatCompletionRequest, {"self": value})
    assert error.param == name
    assert error.message.startswith(f"Unknown parameter: '{name}'.")


@pytest.mark.parametrize(("given_", "limit"), [({}, None), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 4}, 4)])
def test_the_token_limit_has_two_names(given_, limit):
    assert chat(**given_).token_limit == limit


def test_two_limits_must_agree():
    assert chat(max_tokens=3, max_completion_tokens=3).token_limit == 3
    assert refused(max_tokens=3, max_completion_tokens=4).param == "max_tokens"


def test_stream_options_need_a_stream():
    assert not chat(stream=True, stream_options={"include_usage": None}).include_usage
    assert refused(stream_options={"include_usage": True}).param == "stream_options"


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_is_off_at_both_of_its_zeros(top_k):
    assert SamplingParams(**chat(top_k=top_k).sampling).top_k == 0


@pytest.mark.parametrize("parts", [[], ["Hel", "lo"], ["Hello"]])
def test_text_parts_are_one_string(parts):
    content = [{"type": "text", "text": part} for part in parts]
    assert messages({"role": "user", "content": content}) == messages({"role": "user", "content": "".join(parts)})


def test_every_role_is_understood():
    conversation = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "t", "tool_call_id": "c1"},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
    ]
    assert [(message.role, message.parts, message.name) for message in messages(*conversation)] == [
        ("system", (Text("s"),), None),
        ("developer", (Text("d"),), None),
        ("user", (Text("u"),), "Ann"),
        ("assistant", (ToolCall("c1", "f", {}),), None),
        ("tool", (ToolResult("c1", "t"),), None),
        ("assistant", (Reasoning("r"), Text("a")), None),
    ]


def test_a_message_knows_where_the_client_wrote_it():
    assert [message.origin for message in messages(*HELLO, *HELLO)] == ["messages[0]", "messages[1]"]


def test_an_answer_can_be_sent_back_whole():
    """SDKs send all fields of an answer, null or empty where there was nothing."""
    answer = {"role": "assistant", "content": "a", "refusal": None, "audio": None, "tool_calls": [], "annotations": []}
    assert messages(answer) == messages({"role": "assistant", "content": "a"})


def test_reasoning_has_two_names():
    for name in ("reasoning", "reasoning_content"):
        assert messages({"role": "assistant", name: "r"})[0].parts == (Reasoning("r"),)
    both = {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r"}
    assert messages(both)[0].parts == (Reasoning("r"), Text("a"))
    assert messages(both | {"reasoning": "q"})[0].parts == (Reasoning("r"), Reasoning("q"), Text("a"))


def test_reasoning_may_be_a_part_of_an_answers_content():
    content = [
        {"type": "thinking", "thinking": "r"},
        {"type": "text", "text": "a"},
        {"type": "output_text", "text": "b"},
    ]
    answer = {"role": "assistant", "content": content}
    assert messages(answer)[0].parts == messages(answer | {"reasoning": "r"})[0].parts == (Reasoning("r"), Text("ab"))
    assert refused(messages=[{"role": "user", "content": content}]).param == "messages[0].content[0].type"


@pytest.mark.parametrize(
    ("text", "read"), [("", {}), (" ", {}), (None, {}), ("{}", {}), ('{"a": [1]}', {"a": [1]}), ({"a": 1}, {"a": 1})]
)
def test_arguments_are_the_object_that_their_text_stands_for(text, read):
    assert messages(calling(text))[0].calls == [ToolCall("c1", "f", read)]


@pytest.mark.parametrize("text", ["{", "[1]", "null", "5", "nonsense", '{"a": "\\ud800"}', "[" * 100_000])
def test_arguments_that_are_no_object_are_kept_as_text(text):
    """The history is not judged: max_tokens cuts calls, and models write what is no JSON."""
    assert messages(calling(text))[0].calls == [ToolCall("c1", "f", {"arguments": text}, text)]


def test_what_is_missing_in_the_history_is_empty():
    call = {"function": {"name": "f"}}
    assert messages({"role": "assistant", "tool_calls": [call]})[0].parts == (ToolCall("", "f", {}),)
    assert messages({"role": "tool"})[0].parts == (ToolResult("", ""),)
    for role in ("system", "developer", "user", "assistant"):
        assert messages({"role": role, "content": None})[0].parts == ()


def test_fields_that_other_servers_write_are_left_out():
    foreign = {"annotations": [1], "reasoning_details": [{}], "provider_specific_fields": {}, "cache_control": {}}
    assert messages({"role": "assistant", "content": "a", **foreign})[0].parts == (Text("a"),)
    assert messages({"role": "tool", "content": "a", "is_error": True})[0].parts == (ToolResult("", "a"),)
    assert messages({"role": "user", "content": "a", "cache_control": {"type": "ephemeral"}})[0].parts == (Text("a"),)


def test_a_refusal_stands_for_its_content():
    assert messages({"role": "assistant", "content": None, "refusal": "No."})[0].text == "No."


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ("x", ""),
        ({}, ".role"),
        ({"role": "robot", "content": "x"}, ".role"),
        ({"role": ["user"], "content": "x"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": ["x"]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, ".content[1].image_url"),
        ({"role": "user", "content": [{"text": "a"}]}, ".content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, ".content[0].text"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, ".tool_calls"),
        ({"role": "user", "content": "x", "foo": 1}, ".foo"),
        ({"role": "user", "content": "x", "name": 5}, ".name"),
        ({"role": "assistant", "content": 5}, ".content"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, ".tool_call_id"),
        ({"role": "assistant", "tool_calls": "x"}, ".tool_calls"),
        ({"role": "assistant", "tool_calls": ["x"]}, ".tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, ".tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [CALL | {"id": 1}]}, ".tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": "f"}]}, ".tool_calls[0].function"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"arguments": "{}"}}]},
            ".tool_calls[0].function.name",
        ),
    ],
)
def test_a_wrong_message_is_refused_by_place(wrong, param):
    assert refused(messages=[*HELLO, wrong]).param == f"messages[1]{param}"


@pytest.mark.parametrize("wrong", [[], {}, "Hello", 5, True])
def test_messages_are_a_list_with_something_in_it(wrong):
    assert refused(messages=wrong).param == "messages"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[]", b"[1]", b"5", b"null", b'"x"', b'{"model":NaN}', b'{"model":1e999}', b"\xff",
        b'{"model":"\xff"}', b'{"model":"\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000, b'{"model":"\x00"}', b"{} {}",
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body):
    assert refusal(ChatCompletionRequest, body).param is None


def test_deep_values_are_refused_like_others():
    deep = b"[" * 900 + b"]" * 900
    for name in (b"temperature", b"stop", b"logit_bias", b"messages", b"foo"):
        assert refusal(ChatCompletionRequest, b'{"model":"m","%b":%b}' % (name, deep)).param


def test_a_null_byte_is_text_like_other_text():
    assert messages({"role": "user", "content": "a\0b"})[0].text == "a\0b"


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), JSON, max_size=5), st.booleans())
def test_any_object_is_a_request_or_refused(parameters, is_complete):
    body = orjson.dumps(({"model": "m", "messages": HELLO} if is_complete else {}) | parameters)
    try:
        request = parse(ChatCompletionRequest, body)
    except ValidationFailed:
        return
    assert request.temperature is None or 0 <= request.temperature <= 2
    assert request.repetition_penalty is None or math.isfinite(request.repetition_penalty)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_request_or_refused(body):
    with pytest.raises(ValidationFailed):
        parse(ChatCompletionRequest, body)


@given(st.dictionaries(st.sampled_from([n for n in FIELDS if n not in ("max_tokens", "stream_options")]), JSON))
def test_what_is_taken_is_valid_by_the_published_schema(parameters):
    body = {"model": "m", "messages": HELLO} | parameters
    try:
        parse(ChatCompletionRequest, orjson.dumps(body))
    except ValidationFailed:
        return
    given_ = {name: value for name, value in body.items() if value is not None}
    jsonschema.validate(given_, json_schema(ChatCompletionRequest), jsonschema.Draft202012Validator)


@pytest.mark.parametrize("schema", [ChatCompletionRequest, LoadRequest, UnloadRequest])
def test_the_published_schema_is_one(schema):
    published = json_schema(schema)
    jsonschema.Draft202012Validator.check_schema(published)
    assert all(described["description"] for described in published["properties"].values())


def test_the_published_schema_has_bounds_and_defaults():
    properties = json_schema(ChatCompletionRequest)["properties"]
    assert properties["top_p"] == {
        "description": "Keep the likeliest tokens up to this probability.",
        "anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "null"}],
        "default": None,
    }


def test_a_load_needs_only_a_source():
    request = parse(LoadRequest, b'{"model":"org/Name"}')
    assert (request.model, request.key, request.type, request.adapter, request.context_length) == (
        "org/Name", None, None, None, None,
    )  # fmt: skip


def test_a_load_takes_what_a_models_section_takes():
    stated = {each.name for each in dataclasses.fields(ModelSpec)} - {
        "key",
        "source",
        "preload",
        "drafter",
        "is_widened",
    }
    values = {"type": "thinking", "adapter": "d", "context_length": 512, "max_running": 2, "max_waiting": 3}
    values |= {"prefix_cache_bytes": 5, "checkpoint_interval": 64, "cache_tokens": 600, "aliases": ["one", "gpt-*"]}
    values |= {"pin": True, "ttl": 60, "defaults": {"temperature": 0.5}, "shard": "tensor", "kind": "text"}
    values |= {"unclosed_thinking": "content", "min_context": 128, "weights": "stored", "kv_bits": 8}
    values |= {"kv_group_size": 32, "speculation": "off", "draft": "small", "policy": {"pad_slots": True}}
    values |= {"mtp": False}
    assert values.keys() == stated
    spec = parse(LoadRequest, orjson.dumps({"model": "org/name", **values})).spec
    assert {name: getattr(spec, name) for name in stated} == {**values, "aliases": ("one", "gpt-*")}
    assert parse(LoadRequest, b'{"model":"org/name"}').spec == ModelSpec("name", "org/name")


def test_a_load_request_has_every_field():
    body = {"model": "x.gguf", "key": "a/b:c", "type": "thinking", "adapter": "d", "context_length": 512}
    body |= {"weights": "stored", "kv_bits": 4, "kv_group_size": 32, "policy": {"pad_slots": True}}
    request = parse(LoadRequest, orjson.dumps(body))
    assert {name: getattr(request, name) for name in body} == body
    assert (request.spec.weights, request.spec.kv_bits, request.spec.kv_group_size) == ("stored", 4, 32)
    assert request.spec.policy == {"pad_slots": True}


@pytest.mark.parametrize(
    ("policy", "param"),
    [
        ([], "policy"),
        ({"speed": True}, "policy.speed"),
        ({"pad_slots": 1}, "policy.pad_slots"),
        ({"compile_steps": True, "pad_slots": False}, "policy.pad_slots"),
    ],
)
def test_a_wrong_policy_is_refused_by_its_field(policy, param):
    assert refusal(LoadRequest, {"model": "m", "policy": policy}).param == param


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", ["", " ", "a\0b", "a\nb", 5]),
        ("key", ["", "a b", "a=b", "ä", "x" * 129, "a\n", 5]),
        ("type", ["Thinking", "", "chat", True]),
        ("adapter", ["", "a\0b", 5]),
        ("weights", ["", "float16", 32]),
        ("kv_bits", [0, 5, 16, "8", True]),
        ("kv_group_size", [0, 16, 96, "64"]),
        ("context_length", [0, -1, 1.5, "5"]),
        ("min_context", [15, "16"]),
        ("prefix_cache_bytes", [-1, "1GiB"]),
        ("checkpoint_interval", [0, 1.5]),
        ("unclosed_thinking", ["", True]),
        ("aliases", ["name", [5], ["a b"], [""], {"a": 1}]),
        ("foo", [1]),
    ],
)
def test_a_wrong_load_is_refused_by_name(name, values):
    assert [refusal(LoadRequest, {"model": "m", name: value}).param for value in values] == [name for _ in values]


def test_an_unload_drains_by_default():
    request = parse(UnloadRequest, b'{"key":"m"}')
    assert (request.key, request.mode, request.timeout) == ("m", "drain", None)
    assert parse(UnloadRequest, b'{"key":"m","mode":"abort","timeout":5}').timeout == 5.0


@pytest.mark.parametrize(("name", "values"), [("mode", ["", "kill", 1]), ("timeout", [0, -1, "5", True, 1e308])])
def test_a_wrong_unload_is_refused_by_name(name, values):
    assert [refusal(UnloadRequest, {"key": "m", name: value}).param for value in values] == [name for _ in values]


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("embedded:smollm2", "smollm2"),
        ("mlx-community/Mistral-7B-Instruct-v0.3-4bit", "mistral-7b-instruct-v0.3-4bit"),
        ("/models/My Model.GGUF", "my-model"),
        ("./llama/", "llama"),
        ("x" * 300, "x" * 128),
    ],
)
def test_a_key_is_made_from_the_source(source, key):
    assert derive_key(source) == key


@pytest.mark.parametrize("source", ["", "/", "..", "???", "模型", ".gguf"])
def test_a_source_without_a_name_needs_a_key(source):
    with pytest.raises(ValidationFailed, match="Give one as 'key'"):
        derive_key(source)


@given(st.text())
def test_a_made_key_is_a_key(source):
    try:
        key = derive_key(source)
    except ValidationFailed:
        return
    assert parse(LoadRequest, orjson.dumps({"model": "m", "key": key})).key == key
