"""Grammars of tool calls in every kind of format: beside a schema, and strict within free text."""

import itertools
import json
import re
from functools import partial

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import AddedToken

from mlxserver.engine.conversation import Tool
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.call_families import FAMILIES, LLAMA
from mlxserver.engine.output.tool_formats import PLAIN, parsed_format
from mlxserver.engine.requests import ToolChoice
from mlxserver.engine.sampling.grammars import Grammars
from mlxserver.engine.sampling.tool_grammars import calls_or_answer, forced_calls, strict_calls
from tests.support.grammars import admits as grammar_admits

CONTROL = ["<|tool_call>", "<tool_call|>", '<|"|>', "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|call|>", "<|sep|>", "]~["]
ANSWER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_path):
    loaded = load_tokenizer(tiny_llama_path)
    loaded.backend_tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    return loaded


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, tokenizer.backend_tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def admits(grammars, tokenizer):
    return partial(grammar_admits, grammars, tokenizer)


def native(name):
    return next(family.format for family in FAMILIES if family.format.name == name)


def tool(name="add", strict=None, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return Tool(name, None, parameters, strict, "tools[0].function")


XML = "<tool_call>\n<function={}>\n{}</function>\n</tool_call>"
WRITTEN = {
    "json": (native("json"), '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'),
    "plain": (PLAIN, '<tool_call>{"name": "add", "arguments": {}}</tool_call>'),
    "xml": (native("qwen3_coder"), XML.format("add", "<parameter=a>\n1\n</parameter>\n")),
    "keyed": (native("glm"), "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"),
    "control tokens": (native("gemma4"), '<|tool_call>call:add{a:1,b:<|"|>é<|"|>}<tool_call|>'),
    "no end": (native("mistral"), '[TOOL_CALLS]add[ARGS]{"a": 1}'),
    "pythonic": (native("pythonic"), "<|tool_call_start|>[add(a=1)]<|tool_call_end|>"),
    "a section": (
        native("kimi_k2"),
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
    ),
    "mixed tags": (
        parsed_format("<|call|>tools<|sep|>", "<|call|>end<|sep|>", len),
        "<|call|>tools<|sep|>x<|call|>end<|sep|>",
    ),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_beside_a_schema_calls_of_every_format_are_admitted(grammars, admits, kind):
    tool_format, call = WRITTEN[kind]
    made = {
        parallel: calls_or_answer(
            [tool(a={"type": "integer"})],
            ToolChoice(parallel=parallel),
            tool_format,
            grammars,
            schema=ANSWER,
            param="format.schema",
            thinks=True,
        )
        for parallel in (True, False)
    }
    for grammar in made.values():
        for text in (call, f"\n\n{call}", '{"n": 1}', '\n{"n":1}'):
            assert admits(grammar, text), text
        for text in ("words", "", f"words {call}", '{"m": 1}', f'{{"n": 1}}{call}', tool_format.start):
            assert not admits(grammar, text), text
    assert admits(made[True], f"{call}\n{call}")
    if tool_format.end:
        assert not admits(made[False], f"{call}\n{call}")
        assert not admits(made[True], f"{call} words")


OTHER_STARTS = {
    "qwen3_coder": "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "dsml": '<｜DSML｜invoke name="add">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "deepseek": "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama": '<|python_tag|>{"name": "add", "parameters": {"a": 1}}',
}


@pytest.mark.parametrize("family", OTHER_STARTS)
def test_beside_a_schema_every_start_tag_begins_a_call(grammars, admits, family):
    grammar = calls_or_answer(
        [tool()], ToolChoice(), native(family), grammars, schema=ANSWER, param="format.schema", thinks=False
    )
    assert admits(grammar, OTHER_STARTS[family]) and admits(grammar, '{"n": 1}')
    assert not admits(grammar, f"words {OTHER_STARTS[family]}")


def test_a_model_that_marks_no_calls_writes_them_as_json(grammars, admits):
    grammar = calls_or_answer(
        [tool()], ToolChoice(), LLAMA, grammars, schema=ANSWER, param="format.schema", thinks=False
    )
    assert admits(grammar, '{"n": 1}') and admits(grammar, '{"name": "add", "parameters": {"a": 1}}')
    assert not admits(grammar, '{"name": "other", "parameters": {"a": 1}}')


PLAY = Tool(
    "play",
    parameters={"type": "object", "properties": {"input": {"type": "string"}}},
    origin="tools[0]",
    held={
        "type": "object",
        "properties": {"input": {"type": "string", "pattern": '^(?:[a-h][1-8]\n"end")$'}},
        "required": ["input"],
        "additionalProperties": False,
    },
)
RIGHT, WRONG = '{"input": "e4\\n\\"end\\""}', '{"input": "z9"}'


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("json", '<tool_call>\n{{"name": "play", "arguments": {}}}\n</tool_call>'),
        ("mistral", "[TOOL_CALLS]play[ARGS]{}"),
    ],
)
def test_arguments_are_held_to_what_the_model_is_not_shown(grammars, admits, family, call):
    grammar = strict_calls([PLAY], native(family), grammars)
    assert grammar.param == "tools[0].parameters"
    assert admits(grammar, call.format(RIGHT))
    assert not admits(grammar, call.format(WRONG))


def test_a_forced_call_is_held_to_it_too_and_text_between_tags_is_not(grammars, admits):
    forced = forced_calls([PLAY], ToolChoice("required"))
    assert admits(forced, f'[{{"name": "play", "arguments": {RIGHT}}}]')
    assert not admits(forced, f'[{{"name": "play", "arguments": {WRONG}}}]')
    assert strict_calls([PLAY], native("qwen3_coder"), grammars) is None


def strict(grammars, *tools):
    return strict_calls(tools, native("qwen3_coder"), grammars)


VALUES = [
    ({"type": "string"}, ["text", "a\nb", "<b>&", "null", "  padded "], []),
    ({"type": ["string", "null"]}, ["text", "null"], []),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["5", "null", "12345678901234567890"], ["five", "1.5", '"5"']),
    ({"type": "boolean"}, ["true", "false"], ["True", "yes"]),
    ({"enum": ["a b", "c"]}, ["a b", "c"], ["a", '"c"']),
    ({"enum": ["a", None, 1]}, ["a", "null", "1"], ["b", "2"]),
    ({"$ref": "#/$defs/size"}, ["1"], ["4"]),
    ({"type": "string", "maxLength": 3}, ["abc", ""], ["abcd"]),
    ({"type": "object", "properties": {"x": {"type": "array"}}, "required": ["x"]}, ['{"x": [1, 2]}'], ["{}", "[]"]),
]


@pytest.mark.parametrize(("schema", "fit", "unfit"), VALUES, ids=str)
def test_strict_values_between_tags_fit_their_schema(grammars, admits, schema, fit, unfit):
    made = tool("add", True, a=schema)
    made.parameters["$defs"] = {"size": {"type": "integer", "maximum": 3}}
    grammar = strict(grammars, made, tool("free"))
    for value in fit:
        call = XML.format("add", f"<parameter=a>\n{value}\n</parameter>\n")
        assert admits(grammar, f"Words first. {call} and last."), value
        assert admits(grammar, call + call)
    for value in unfit:
        assert not admits(grammar, XML.format("add", f"<parameter=a>\n{value}\n</parameter>\n")), value


def test_strict_parameters_between_tags_are_those_of_the_schema(grammars, admits):
    grammar = strict(grammars, tool("add", True, a={"type": "integer"}, b={"type": "string"}), tool("free"))
    a, b, c = (f"<parameter={name}>\n1\n</parameter>\n" for name in "abc")
    assert admits(grammar, XML.format("add", a)) and admits(grammar, XML.format("add", a + b))
    for parameters in ("", b, b + a, a + a, a + c, "words"):
        assert not admits(grammar, XML.format("add", parameters)), parameters
    for parameters in ("", b, c + a, "words"):
        assert admits(grammar, XML.format("free", parameters)), parameters
    assert not admits(grammar, XML.format("other", ""))


TAGGED = {
    "qwen3_coder": XML.format("add", "<parameter=a>\n{}\n</parameter>\n<parameter=b>\nx\n</parameter>\n"),
    "seed": "<seed:tool_call>\n<function=add>\n<parameter=a>{}</parameter>\n</function>\n</seed:tool_call>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">{}</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    "muse": '<atem:function_calls>\n<atem:invoke name="add">\n<atem:parameter name="a">{}</atem:parameter>\n'
    "</atem:invoke>\n</atem:function_calls>",
    "glm": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>",
    "mistral": '[TOOL_CALLS]add[ARGS]{{"a": {}}}',
    "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{{"a": {}}}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    '{{"a": {}}}<|tool_call_end|><|tool_calls_section_end|>',
    "dsml": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="add">\n'
    '<｜DSML｜parameter name="a" string="false">{}</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="true">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "solar": '<|tool_call:begin|>abc<|tool_call:name|>add<|tool_call:args|>{{"a": {}}}<|tool_call:end|>',
    "apertus": '<|tools_prefix|>[{{"add": {{"a": {}}}}}]<|tools_suffix|>',
    "nemotron": '<TOOLCALL>[{{"name": "add", "arguments": {{"a": {}}}}}]</TOOLCALL>',
    "phi4": '<|tool_call|>[{{"name": "add", "arguments": {{"a": {}}}}}]<|/tool_call|>',
    "granite": '<|tool_call|>[{{"name": "add", "arguments": {{"a": {}}}}}]',
    "json_list": '<tool_calls>[{{"name": "add", "arguments": {{"a": {}}}, "id": "1"}}]</tool_calls>',
    "cohere": '<|START_ACTION|>[\n    {{"tool_call_id": "0", "tool_name": "add", "parameters": {{"a": {}}}}}\n]'
    "<|END_ACTION|>",
    "longcat": "<longcat_tool_call>add<longcat_arg_key>a</longcat_arg_key><longcat_arg_value>{}</longcat_arg_value>"
    "</longcat_tool_call>",
}


@pytest.mark.parametrize("family", TAGGED)
def test_strict_calls_of_every_family_with_tags_are_held_to_their_schema(grammars, admits, family):
    tools = [tool("add", True, a={"type": "integer"}, b={"type": "string"}), tool("free")]
    grammar = strict_calls(tools, native(family), grammars)
    call = TAGGED[family]
    for text in (
        call.format(1),
        f"Words. {call.format(1)}\n{call.format(2)} Words.",
        "words",
        call.format(1).replace("add", "free"),
    ):
        assert admits(grammar, text), text
    for text in (call.format('"one"'), call.format(1).replace("add", "other"), call.format("")):
        assert not admits(grammar, text), text


def test_strict_values_between_tags_state_truly_whether_they_are_text(grammars, admits):
    made = tool("add", True, a={"type": ["string", "integer"]}, b={"enum": ["x", None]}, c={"type": "integer"})
    grammar = strict_calls([made], native("dsml"), grammars)
    call = '<｜DSML｜invoke name="add">{}</｜DSML｜invoke>'
    written = {
        (key, stated): f'<｜DSML｜parameter name="{key}" string="{stated}">1</｜DSML｜parameter>'
        for key, stated in itertools.product("abc", ("true", "false"))
    }
    whole = f"<｜DSML｜function_calls>{call}</｜DSML｜function_calls>".format
    for stated in ("true", "false"):
        assert admits(grammar, whole(written["a", stated]))
        assert admits(grammar, whole(written["a", stated] + written["b", "true"].replace(">1<", ">x<")))
        assert admits(grammar, whole(written["a", stated] + written["c", stated])) == (stated == "false")
    assert not admits(grammar, whole(written["c", "false"]))


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "^a"}}}, "properties.a.pattern"),
        ({"properties": {"a": {"type": "string", "format": "uuid"}}}, "properties.a.format"),
        ({"properties": {"a": {"uniqueItems": True, "type": "array"}}}, "properties.a.uniqueItems"),
        ({"anyOf": [{"properties": {}}]}, "anyOf"),
        ({"properties": {}, "required": ["a"]}, "required"),
    ],
)
def test_what_can_not_be_enforced_between_tags_is_refused_with_its_path(grammars, parameters, place):
    made = Tool("mail", None, {"type": "object", **parameters}, True, "tools[3].function")
    with pytest.raises(PromptRejected, match=f"'mail'.*{re.escape(place)}") as refused:
        strict(grammars, made)
    assert refused.value.param == f"tools[3].function.parameters.{place}"


@pytest.mark.parametrize("kind", ["pythonic", "control tokens", "mixed tags"])
def test_strict_has_no_effect_in_other_formats_beside_a_schema_too(grammars, admits, kind):
    tool_format, call = WRITTEN[kind]
    tools = [tool(strict=True, a={"type": "integer"})]
    assert strict_calls(tools, tool_format, grammars) is None
    grammar = calls_or_answer(
        tools, ToolChoice(), tool_format, grammars, schema=ANSWER, param="format.schema", thinks=False
    )
    assert admits(grammar, call) and admits(grammar, '{"n": 1}') and not admits(grammar, "words")


def test_strict_arguments_keep_their_schema_beside_a_schema(grammars, admits):
    tools = [tool("add", True, a={"type": "integer"}), tool("free")]
    grammar = calls_or_answer(tools, ToolChoice(), PLAIN, grammars, schema=ANSWER, param="format.schema", thinks=False)

    def call(name, arguments):
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"

    assert admits(grammar, call("add", {"a": 1})) and admits(grammar, call("free", {"b": "x"}))
    assert not admits(grammar, call("add", {"a": "1"})) and not admits(grammar, call("add", {}))
    assert not admits(grammar, call("other", {}))


def test_a_control_token_is_one_by_its_entry_whatever_its_text(grammars, tokenizer):
    ids = tokenizer.get_vocab()
    assert grammars.split("a]~[<|call|>b") == ["a", ids["]~["], ids["<|call|>"], "b"]
    assert ids["]~["] in grammars.control_tokens()


NAMED = [
    ("mistral", "[TOOL_CALLS]add[ARGS]{}"),
    ("mistral", "[TOOL_CALLS]add[CALL_ID]a1B2c3D4e[ARGS]{}"),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
    ),
]


@pytest.mark.parametrize(("family", "written"), NAMED)
def test_strict_arguments_behind_a_name_fit_their_schema_in_every_form(grammars, admits, family, written):
    grammar = strict_calls([tool("add", True, a={"type": "integer"})], native(family), grammars)
    assert admits(grammar, written.replace("{}", '{"a": 1}'))
    assert not admits(grammar, written)
    assert not admits(grammar, written.replace("{}", '{"a": "1"}'))
    assert not admits(grammar, written.replace("add", "other").replace("{}", '{"a": 1}'))
