"""Tool calls are parsed out of the content, in every model family's format, however the text is cut."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tool_parsers import gemma4, glm47, json_tools, kimi_k2, minicpm5, mistral, pythonic, qwen3_coder

from mlxserver.engine.conversation import Message, Text, Tool
from mlxserver.engine.events import ToolCallDelta
from mlxserver.engine.output.json_calls import CallScanner, ScanState
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.tool_calls import ToolCallParser, make_tool_parser
from mlxserver.engine.output.tool_formats import FORCED, PLAIN, ParsedCalls, parsed_format
from mlxserver.engine.requests import ChatPrompt, GenerationRequest, TextPrompt, ToolChoice

TOOLS = (Tool("add", parameters={"type": "object", "properties": {}}),)


def native(module):
    return parsed_format(module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def parse(pieces, tool_format=PLAIN, *, is_cut=False, **options):
    """Content, calls as (name, arguments), and how many are whole."""
    parser = ToolCallParser(tool_format, TOOLS, **options)
    events = [event for piece in pieces if not parser.is_done for event in parser.feed(piece)]
    events += parser.flush(is_cut=is_cut)
    content = "".join(event.text for event in events if isinstance(event, TokenText))
    calls = []
    for event in events:
        if isinstance(event, ToolCallDelta):
            if event.id:
                assert event.call == len(calls)
                calls.append([event.name, ""])
            assert event.call == len(calls) - 1
            calls[-1][1] += event.arguments
    return content, [tuple(call) for call in calls], parser.completed


ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
CALL = ("add", '{"a": 1}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("just text", "just text", []),
        (" text \n", " text \n", []),
        (ADD, "", [CALL]),
        (f"Let me see.\n{ADD}", "Let me see.", [CALL]),
        (f"{ADD}\n{ADD}\n", "", [CALL, CALL]),
        (f"{ADD}\nSo that is it. ", "So that is it. ", [CALL]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [CALL]),
        ('<tool_call>{"id": [1], "type": "x", "n": -1.5e3, "name":"add","arguments":{"a": 1}}</tool_call>', "", [CALL]),
        ('<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>', "", [CALL]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [CALL]),
        ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
        ('<tool_call>[{"name": "add", "arguments": {"a": 1}}, {"name": "f"}]</tool_call>', "", [CALL, ("f", "{}")]),
        ('<tool_call>{"name": "f"}\n{"name": "g"}</tool_call>', "", [("f", "{}"), ("g", "{}")]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
            "",
            [("f", '{"a": "</tool_call>"}')],
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": "}\\"{", "b": [{}]}}', "", [("f", '{"a": "}\\"{", "b": [{}]}')]),
        ('<tool_call>{"name": "f"}} oops</tool_call> b', "b", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}</tool_call> b', "b", [("f", "{}")]),
        (f'<tool_call>{{"name": "f"}}{ADD} b', "b", [("f", "{}"), CALL]),
    ],
)
def test_calls_are_parsed_out_of_the_content(text, content, calls):
    assert parse([text]) == (content, calls, len(calls))
    assert parse(text) == (content, calls, len(calls))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>add(1, 2)</tool_call>",
        "a <tool_call></tool_call> b",
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": ""}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
        '<tool_call>{"name": "f\n", "arguments": {}}</tool_call>',
        '<tool_call>{"name" "f"}</tool_call>',
        '<tool_call>{"name": "f", x}</tool_call>',
        '<tool_call>{"n": <tool>}</tool_call>',
        '\n<tool_call>[{"nam',
        " <tool_call> [ ",
        "<tool_ca",
        "a \n<tool_call>",
    ],
)
def test_what_is_no_call_is_content_unchanged(text):
    assert parse([text]) == (text, [], 0)
    assert parse(text) == (text, [], 0)


def test_behind_a_malformed_call_another_one_is_found():
    broken = '<tool_call>{"name": 1}</tool_call>'
    assert parse([broken + ADD]) == (broken, [CALL], 1)
    assert parse(['<tool_call>{"name": "f"}{"x": 1}</tool_call>']) == ('{"x": 1}</tool_call>', [("f", "{}")], 1)


def test_arguments_are_emitted_while_the_model_writes_them():
    parser = ToolCallParser(PLAIN)
    pieces = ('a <tool_call>{"name"', ': "f", "arguments"', ': {"', "x", '": 1', "}", "}</tool_", "call>")
    emitted = [parser.feed(piece) for piece in pieces]
    call_id = emitted[2][0].id
    assert re.fullmatch("call_[0-9a-f]{24}", call_id)
    assert emitted == [
        [TokenText("a")],
        [],
        [ToolCallDelta(0, '{"', call_id, "f")],
        [ToolCallDelta(0, "x")],
        [ToolCallDelta(0, '": 1')],
        [ToolCallDelta(0, "}")],
        [],
        [],
    ]


@pytest.mark.parametrize(
    ("text", "is_cut", "content", "calls", "completed"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a', True, "", [("f", '{"a')], 0),
        ('<tool_call>{"name": "f", "arguments": {"a', False, "", [("f", '{"a')], 0),
        ('<tool_call>{"name": "f", "arguments": {}', False, "", [("f", "{}")], 1),
        ('<tool_call>{"arguments": {}, "na', False, '<tool_call>{"arguments": {}, "na', [], 0),
    ],
)
def test_a_call_that_is_cut_is_not_whole(text, is_cut, content, calls, completed):
    assert parse([text], is_cut=is_cut) == (content, calls, completed)
    assert parse(text, is_cut=is_cut) == (content, calls, completed)


def test_without_parallel_calls_nothing_is_emitted_after_the_first():
    assert parse([ADD + ADD + "x"], parallel=False) == ("", [CALL], 1)
    assert parse(ADD + ADD + "x", parallel=False) == ("", [CALL], 1)
    two = "<|tool_call_start|>[f(a=1), g(b=2)]<|tool_call_end|>"
    assert parse([two], native(pythonic), parallel=False) == ("", [("f", '{"a": 1}')], 1)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('[{"name": "add", "arguments": {"a": 1}}]', "", [CALL]),
        (' [ {"name":"add","arguments":{"a": 1}} , {"name":"f","arguments":{}} ] ', "", [CALL, ("f", "{}")]),
        ("[", "[", []),
        ('[{"name": "f', '[{"name": "f', []),
        ("no JSON at all", "no JSON at all", []),
    ],
)
def test_a_forced_answer_is_calls_and_nothing_else(text, content, calls):
    assert parse([text], FORCED) == (content, calls, len(calls))
    assert parse(text, FORCED) == (content, calls, len(calls))


FAMILIES = {
    "json_tools": (json_tools, ADD, [CALL]),
    "qwen3_coder": (
        qwen3_coder,
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        [("add", '{"a": "1"}')],
    ),
    "glm47": (
        glm47,
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        [CALL],
    ),
    "gemma4": (gemma4, '<|tool_call>call:add{a:1,b:<|"|>é<|"|>}<tool_call|>', [("add", '{"a": 1, "b": "é"}')]),
    "pythonic": (
        pythonic,
        "<|tool_call_start|>[add(a=1), f(b='x')]<|tool_call_end|>",
        [CALL, ("f", '{"b": "x"}')],
    ),
    "minicpm5": (
        minicpm5,
        '<function name="add"><param name="a">1</param></function>',
        [("add", '{"a": "1"}')],
    ),
    "mistral, one array": (mistral, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "f"}]', None),
    "mistral, by name": (mistral, '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{}', None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_own_format(family):
    module, text, calls = FAMILIES[family]
    calls = calls or [CALL, ("f", "{}")]
    assert parse([f"So: {text}"], native(module)) == ("So:", calls, len(calls))
    assert parse(f"So: {text}", native(module)) == ("So:", calls, len(calls))


def test_the_id_of_a_family_that_has_one_is_kept():
    call = '<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'
    text = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
    assert ToolCallParser(native(kimi_k2)).feed(text) == [ToolCallDelta(0, '{"a": 1}', "functions.add:0", "add")]


@pytest.mark.parametrize(
    ("call", "name", "arguments"),
    [
        (r'{"name": "a\ud800b", "arguments": {}}', "a\ufffdb", "{}"),
        (r'{"name": "\ud83d\ude00", "arguments": "{\"x\": \"\udc00\"}"}', "\U0001f600", '{"x": "\ufffd"}'),
        (r'{"name": "a", "arguments": {"x": "\ud800"}}', "a", r'{"x": "\ud800"}'),
    ],
)
def test_a_lone_surrogate_that_a_model_writes_can_be_sent(call, name, arguments):
    parser = ToolCallParser(PLAIN)
    events = [*parser.feed(f"<tool_call>{call}</tool_call>"), *parser.flush(is_cut=False)]
    assert [(event.name, event.arguments) for event in events] == [(name, arguments)]
    assert json.loads(events[0].arguments) is not None and arguments.encode()


def test_a_lone_surrogate_out_of_a_familys_parser_can_be_sent():
    found = {"name": "a\ud800", "arguments": {"x": "\udc00"}, "id": "\udfff"}
    call = ParsedCalls(">", lambda body, tools: found).parse("x", [])[0]
    assert (call.name, call.arguments, call.id) == ("a\ufffd", '{"x": "\ufffd"}', "\ufffd")


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_body_without_its_end_tag_is_a_call_only_if_the_model_ended_there(is_cut):
    text = "<|tool_call_start|>[add(a=1)]"
    expected = (text, [], 0) if is_cut else ("", [CALL], 1)
    assert parse([text], native(pythonic), is_cut=is_cut) == expected


@pytest.mark.parametrize(
    "found", [None, [], {}, {"name": ""}, {"name": "f", "arguments": 1}, {"name": "f", "arguments": {"a": {1}}}, [7]]
)
def test_whatever_a_familys_parser_returns_is_checked(found):
    text = "<x>body</x>"
    assert parse([text], parsed_format("<x>", "</x>", lambda body, tools: found)) == (text, [], 0)


def test_parsers_find_parameters_in_every_tool():
    seen = []
    parser = ToolCallParser(parsed_format("<x>", "</x>", lambda body, tools: seen.append(tools)), [Tool("f")])
    parser.feed("<x>body</x>")
    assert seen == [[{"type": "function", "function": {"name": "f", "parameters": {}}}]]


@pytest.mark.parametrize(
    ("mode", "tools", "text", "calls"),
    [
        ("auto", TOOLS, ADD, 1),
        ("auto", TOOLS, '[{"name": "f"}]', 0),
        ("required", TOOLS, '[{"name": "f"}]', 1),
        ("function", TOOLS, '[{"name": "f"}]', 1),
        ("none", TOOLS, ADD, None),
        ("auto", (), ADD, None),
    ],
)
def test_the_choice_decides_what_is_parsed_as_a_call(mode, tools, text, calls):
    prompt = ChatPrompt((Message("user", (Text("a"),)),), tools)
    parser = make_tool_parser(PLAIN, GenerationRequest(prompt, tool_choice=ToolChoice(mode)))
    assert (parser and (parser.feed(text), parser.completed)[1]) == calls
    assert make_tool_parser(PLAIN, GenerationRequest(TextPrompt("a"))) is None


def test_a_format_names_the_texts_that_begin_a_call():
    assert (PLAIN.starts, FORCED.starts) == (("<tool_call>",), ())


FRAGMENTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "_call>",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        " ",
        "\n",
        '"',
        "\\",
        "é",
        "a",
        "1",
    ),
    *(
        '{"name": "f", "arguments": {"a": 1}}',
        '{"name": "f", ',
        '"arguments": {',
        '"name": "g"',
        '{"arguments": "{}", ',
    ),
    *(ADD, "f(a=1)"),
]
FORMATS = {
    "plain": PLAIN,
    "forced": FORCED,
    "mistral": native(mistral),
    "pythonic": parsed_format("<tool_call>", "</tool_call>", pythonic.parse_tool_call),
}


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.lists(st.integers(0, 200)),
    st.sampled_from(list(FORMATS)),
    st.booleans(),
    st.booleans(),
)
def test_any_cut_gives_the_same_content_and_calls(text, cuts, name, parallel, is_cut):
    if name == "mistral":
        text = text.replace("<tool_call>", "[TOOL_CALLS]")
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    whole = parse([text], FORMATS[name], is_cut=is_cut, parallel=parallel)
    assert parse(pieces, FORMATS[name], is_cut=is_cut, parallel=parallel) == whole
    assert parse(text, FORMATS[name], is_cut=is_cut, parallel=parallel) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.text(min_size=1), st.dictionaries(st.text(), JSON, max_size=4), JSON, st.booleans(), st.permutations(range(3))
)
def test_any_json_call_is_scanned_and_its_arguments_are_the_very_text(name, arguments, other, ascii_, order):
    fields = [("name", name), ("arguments", arguments), ("other", other)]
    text = json.dumps(dict(fields[n] for n in order), ensure_ascii=ascii_)
    scanner = CallScanner()
    assert scanner.feed(text[1:] + " more") == len(text) - 1
    assert (scanner.name, scanner.state) == (name, ScanState.WHOLE)
    assert scanner.take_arguments() == json.dumps(arguments, ensure_ascii=ascii_)
