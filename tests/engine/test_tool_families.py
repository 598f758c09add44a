"""Every family's calls are read as the model wrote them, piece by piece, however the text is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.engine.conversation import Tool
from mlxserver.engine.events import ToolCallDelta
from mlxserver.engine.output.call_families import FAMILIES, find_format
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.native_formats import LLAMA, PYTHONIC, QWEN_XML
from mlxserver.engine.output.tool_calls import ToolCallParser

PARAMETERS = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "n": {"type": "number"},
        "o": {"type": "object"},
        "a": {"type": "array"},
    },
}
TOOLS = [Tool(name, "Tries.", PARAMETERS) for name in ("f", "fs.read_file", "get-weather")]
FORMATS = {family.format.name: family.format for family in FAMILIES}
FORMATS["hunyuan"] = next(family.format for family in FAMILIES if family.marks == ("<tool_sep>",))
M3 = "]<]minimax[>["


def read(tool_format, pieces, *, is_cut=False, **options):
    """Content, calls as (name, arguments), and the pieces of the arguments of each call."""
    parser = ToolCallParser(tool_format, TOOLS, **options)
    events = [event for piece in pieces if not parser.is_done for event in parser.feed(piece)]
    events += parser.flush(is_cut=is_cut)
    content = "".join(event.text for event in events if isinstance(event, TokenText))
    calls = {}
    for event in events:
        if isinstance(event, ToolCallDelta):
            assert (event.name is None) == (event.id is None) == (event.call in calls)
            calls.setdefault(event.call, (event.name, []))[1].append(event.arguments)
    return content, [(name, "".join(written)) for name, written in calls.values()], [w for _, w in calls.values()]


def calls_of(tool_format, text, **options):
    """Content and calls of a text, the same in one piece and in every character of its own."""
    content, calls, _ = read(tool_format, [text], **options)
    assert read(tool_format, text, **options)[:2] == (content, calls)
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


def xml(name, arguments, section="<tool_call>\n{}\n</tool_call>", around="\n"):
    values = "".join(
        f"<parameter={key}>{around}{value if isinstance(value, str) else json.dumps(value)}{around}</parameter>\n"
        for key, value in arguments.items()
    )
    return section.format(f"<function={name}>\n{values}</function>")


def dsml(name, arguments, block):
    written = "".join(
        f'<｜DSML｜parameter name="{key}" string="{json.dumps(isinstance(value, str))}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</｜DSML｜parameter>\n"
        for key, value in arguments.items()
    )
    return f'<｜DSML｜{block}>\n<｜DSML｜invoke name="{name}">\n{written}</｜DSML｜invoke>\n</｜DSML｜{block}>'


def keyed(name, arguments, between="\n", prefix=""):
    values = "".join(
        f"<{prefix}arg_key>{key}</{prefix}arg_key>{between}"
        f"<{prefix}arg_value>{value if isinstance(value, str) else json.dumps(value)}</{prefix}arg_value>{between}"
        for key, value in arguments.items()
    )
    return f"<{prefix}tool_call>{name}{between}{values}</{prefix}tool_call>"


def invoke(name, arguments, start, end, prefix=""):
    values = "".join(
        f'<{prefix}parameter name="{key}">{value if isinstance(value, str) else json.dumps(value)}</{prefix}parameter>'
        for key, value in arguments.items()
    )
    return f'{start}\n<{prefix}invoke name="{name}">{values}</{prefix}invoke>\n{end}'


def gemma_value(value):
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{key}:{gemma_value(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ",".join(map(gemma_value, value)) + "]"
        case None:
            return "None"
        case _:
            return json.dumps(value)


def element(value):
    match value:
        case dict():
            return "".join(f"{M3}<{key}>{element(inner)}{M3}</{key}>" for key, inner in value.items())
        case list():
            return "".join(f"{M3}<item>{element(inner)}{M3}</item>" for inner in value)
        case str():
            return value
        case _:
            return json.dumps(value)


def python(name, arguments):
    values = ", ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={v}" for k, v in arguments.items())
    return f"<|tool_call_start|>[{name}({values})]<|tool_call_end|>"


def hunyuan(name, arguments):
    inner = keyed(name, arguments).replace(f"{name}\n", f"{name}<tool_sep>\n", 1)
    return f"<tool_calls>\n{inner}\n</tool_calls>"


WRITERS = {
    "json": lambda n, a: f'<tool_call>\n{{"name": "{n}", "arguments": {json.dumps(a)}}}\n</tool_call>',
    "qwen3_coder": xml,
    "seed": lambda n, a: xml(n, a, "<seed:tool_call>\n{}\n</seed:tool_call>", ""),
    "glm": keyed,
    "hunyuan": hunyuan,
    "longcat": lambda n, a: keyed(n, a, prefix="longcat_"),
    "minimax_m2": lambda n, a: invoke(n, a, "<minimax:tool_call>", "</minimax:tool_call>"),
    "muse": lambda n, a: invoke(n, a, "<atem:function_calls>", "</atem:function_calls>", "atem:"),
    "minimax_m3": lambda n, a: f'{M3}<tool_call>\n{M3}<invoke name="{n}">{element(a)}{M3}</invoke>\n{M3}</tool_call>',
    "dsml": lambda n, a: dsml(n, a, "tool_calls"),
    "deepseek": lambda n, a: (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{json.dumps(a)}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "kimi_k2": lambda n, a: (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{n}:0<|tool_call_argument_begin|>{json.dumps(a)}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "gemma4": lambda n, a: f"<|tool_call>call:{n}{gemma_value(a)}<tool_call|>",
    "pythonic": python,
    "mistral": lambda n, a: f"[TOOL_CALLS]{n}[CALL_ID]123456789[ARGS]{json.dumps(a)}",
    "cohere": lambda n, a: (
        f'<|START_ACTION|>[\n    {{"tool_call_id": "0", "tool_name": "{n}", "parameters": {json.dumps(a)}}}\n]'
        "<|END_ACTION|>"
    ),
    "apertus": lambda n, a: f'<|tools_prefix|>[{{"{n}": {json.dumps(a)}}}]<|tools_suffix|>',
    "nemotron": lambda n, a: f'<TOOLCALL>[{{"name": "{n}", "arguments": {json.dumps(a)}}}]</TOOLCALL>',
    "solar": lambda n, a: (
        f"<|tool_call:begin|>abc<|tool_call:name|>{n}<|tool_call:args|>{json.dumps(a)}<|tool_call:end|>"
    ),
    "granite": lambda n, a: f'<|tool_call|>[{{"name": "{n}", "arguments": {json.dumps(a)}}}]',
    "gigachat": lambda n, a: f'<|function_call|>{{"name": "{n}", "arguments": {json.dumps(a)}}}',
    "llama": lambda n, a: f'{{"name": "{n}", "parameters": {json.dumps(a)}}}',
    "minicpm5": lambda n, a: (
        f'<function name="{n}">'
        + "".join(
            f'<param name="{k}">{f"<![CDATA[{v}]]>" if isinstance(v, str) else json.dumps(v)}</param>'
            for k, v in a.items()
        )
        + "</function>"
    ),
}
VALUES = [
    {},
    {"s": "x"},
    {"s": ""},
    {"s": "123"},
    {"s": "null"},
    {"s": "true"},
    {"s": '{"a": 1}'},
    {"s": "  indented\n"},
    {"s": "a\n\n  b"},
    {"s": "é<b>&amp;"},
    {"i": 9007199254740993},
    {"i": 1234567890123456789012345678901234567890},
    {"n": 1.5},
    {"a": [1, "two", {"b": [True]}]},
    {"s": "x", "i": -3, "o": {"k": "v", "l": ["w"]}},
]


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("arguments", VALUES, ids=json.dumps)
def test_a_call_means_what_the_model_wrote(family, arguments):
    text = WRITERS[family]("f", arguments)
    assert calls_of(FORMATS[family], text) == ("", [("f", arguments)])


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("name", ["fs.read_file", "get-weather"])
def test_names_have_dots_and_hyphens(family, name):
    assert calls_of(FORMATS[family], WRITERS[family](name, {"a": []}))[1] == [(name, {"a": []})]


@pytest.mark.parametrize("family", sorted(WRITERS.keys() - {"llama"}))
def test_text_round_calls_is_content_and_unknown_functions_are_passed_on(family):
    call = WRITERS[family]("unknown", {})
    after = "" if family in ("granite", "mistral") else "\nSo."
    assert calls_of(FORMATS[family], f"Look:\n{call}{call}{after}") == (
        "Look:" + after.strip(),
        [("unknown", {}), ("unknown", {})],
    )


@pytest.mark.parametrize("family", WRITERS)
def test_arguments_are_streamed(family):
    text = WRITERS[family]("f", {"s": "word " * 40})
    assert len(read(FORMATS[family], text)[2][0]) >= 40


@pytest.mark.parametrize("family", WRITERS)
def test_a_call_that_is_cut_is_no_content(family):
    text = WRITERS[family]("f", {"s": "word " * 4})
    text = text[: text.index("word") + 6]
    content, calls, _ = read(FORMATS[family], text, is_cut=True)
    assert content == ""
    assert [(name, arguments.replace(" ", "")[:9]) for name, arguments in calls] == [("f", '{"s":"wor')]


@pytest.mark.parametrize("family", WRITERS)
def test_what_only_begins_like_a_call_is_content(family):
    for start in FORMATS[family].starts:
        for text in (f"a {start}", f"a {start} b, and {start[:-1]}", f"{start}\n\nc: {{}} (d) [e]"):
            assert calls_of(FORMATS[family], text) == (text, [])


FRAGMENTS = sorted(
    {
        *(fragment for family in WRITERS for fragment in FORMATS[family].starts),
        *("</tool_call>", "<function=f>", "</function>", "<parameter=s>", "</parameter>", "<tool_call|>", "call:f{"),
        *(
            "<arg_key>",
            "s",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
            '<|"|>',
            "[",
            "]",
            "(",
            ")",
            "'",
            '"',
            "=",
            ",",
        ),
        *("{", "}", ":", "\n", " ", "f", "\\", "[ARGS]", '"name": "f"', '"arguments": {}', "<|tool_call_end|>", "</s>"),
        *('<invoke name="f">', f"{M3}<", "s>", f"{M3}</s>", "/invoke>", "<｜DSML｜parameter name=", "<![CDATA[", "]]>"),
    }
)


@given(
    st.sampled_from(sorted(WRITERS)),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.sampled_from(VALUES),
    st.lists(st.integers(0, 300), max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_any_cut_gives_the_same_calls_and_content(family, rest, arguments, cuts, is_first, is_cut):
    call = WRITERS[family]("f", arguments)
    text = call + rest if is_first else rest + call
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    whole = read(FORMATS[family], [text], is_cut=is_cut)[:2]
    assert read(FORMATS[family], [text[a:b] for a, b in pairwise(borders)], is_cut=is_cut)[:2] == whole
    assert read(FORMATS[family], text, is_cut=is_cut)[:2] == whole


def test_qwens_functions_are_read_without_their_opening_tag_and_two_in_one_pair_of_tags():
    one, two = xml("f", {"s": "x"}, "{}"), xml("f", {"i": "2"}, "{}")
    expected = [("f", {"s": "x"}), ("f", {"i": 2})]
    assert calls_of(QWEN_XML, f"Let me.\n{one}\n</tool_call>") == ("Let me.", expected[:1])
    assert calls_of(QWEN_XML, f"{one}\n</tool_call>\n<tool_call>\n{two}\n</tool_call>") == ("", expected)
    assert calls_of(QWEN_XML, f"<tool_call>\n{one}\n{two}\n</tool_call>") == ("", expected)


def test_a_value_that_does_not_fit_its_type_is_text():
    assert calls_of(QWEN_XML, xml("f", {"i": "a lot", "n": "1.50", "a": "[1,"}))[1] == [
        ("f", {"i": "a lot", "n": 1.5, "a": "[1,"})
    ]


def test_qwens_values_keep_all_but_one_line_break_beside_their_tags():
    assert calls_of(QWEN_XML, xml("f", {"s": "\n  a\n\n"}))[1] == [("f", {"s": "\n  a\n\n"})]
    assert calls_of(QWEN_XML, "<tool_call><function=f><parameter=s> a </parameter></function></tool_call>")[1] == [
        ("f", {"s": " a "})
    ]


def test_a_model_that_leaves_closing_tags_out_has_called():
    assert calls_of(QWEN_XML, "<function=f>\n<parameter=s>\nx\n</parameter>") == ("", [("f", {"s": "x"})])
    assert calls_of(QWEN_XML, "<function=f>\n<parameter=s>\nx") == ("", [("f", {"s": "x"})])
    assert calls_of(PYTHONIC, "<|tool_call_start|>[f(s='x')]") == ("", [("f", {"s": "x"})])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("'say \"hi\", it's'", 'say "hi", it\'s'),
        ("'a\n  b'", "a\n  b"),
        ("\"First\\nSecond\\t'x'\"", "First\nSecond\t'x'"),
        ("'print('hi')'", "print('hi')"),
        ("'\\d+ \\u00e9'", "\\d+ é"),
        ("'''long 'text' '''", "long 'text' "),
        ("''", ""),
        ("'\\ud800'", "\ufffd"),
        ("5", "5"),
    ],
)
def test_pythons_text_is_kept_with_quotes_and_line_breaks(written, value):
    text = f"<|tool_call_start|>[f(s={written}, o={{'a': True, \"b\": null}}), f()]<|tool_call_end|>"
    assert calls_of(PYTHONIC, text) == ("", [("f", {"s": value, "o": {"a": True, "b": None}}), ("f", {})])


def test_minimax_m3s_elements_are_typed_by_their_own_schemas():
    properties = {
        "o": {"properties": {"l": {"items": {"type": "string"}}, "n": {"type": "null"}}},
        "e": {"type": "array"},
    }
    tools = [Tool("g", parameters={"properties": {**properties, "u": {"type": ["string", "number"]}}})]
    values = {"o": {"l": ["1", "2"], "n": None}, "e": [], "u": f"{M3}<b>"}
    parser = ToolCallParser(FORMATS["minimax_m3"], tools)
    events = parser.feed(WRITERS["minimax_m3"]("g", values))
    assert json.loads("".join(event.arguments for event in events)) == values


def test_the_ids_of_mistral_and_kimi_are_kept():
    for family, own_id in (("mistral", "123456789"), ("kimi_k2", "functions.f:0"), ("solar", "abc")):
        assert ToolCallParser(FORMATS[family], TOOLS).feed(WRITERS[family]("f", {}))[0].id == own_id


def test_deepseek_r1_writes_arguments_as_markdown():
    call = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"s": "x"}\n```<｜tool▁call▁end｜>'
    text = f"<｜tool▁calls▁begin｜>{call}\n{call}<｜tool▁calls▁end｜>"
    assert calls_of(FORMATS["deepseek"], text) == ("", [("f", {"s": "x"})] * 2)


def test_an_answer_in_json_is_a_call_only_of_a_function_of_the_request():
    """Llama marks its calls with nothing but their form."""
    assert calls_of(LLAMA, '{"name": "f", "parameters": {}}; {"name": "f"}') == ("", [("f", {}), ("f", {})])
    assert calls_of(LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}') == ("", [("f", {})])
    for text in ('{"name": "Ann", "parameters": {}}', 'So {"name": "f", "parameters": {}}'):
        assert calls_of(LLAMA, text) == (text, [])


def test_a_json_object_between_the_tags_of_another_format_is_a_call():
    assert calls_of(QWEN_XML, WRITERS["json"]("f", {"s": "x"})) == ("", [("f", {"s": "x"})])


def test_the_types_that_the_format_itself_writes_win():
    assert calls_of(FORMATS["dsml"], dsml("f", {"undeclared": "5", "other": 5}, "tool_calls"))[1] == [
        ("f", {"undeclared": "5", "other": 5})
    ]


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if not family.is_in_vocabulary], ids=lambda family: family.format.name
)
def test_every_family_is_found_by_what_its_template_contains(tiny_tokenizer, family):
    assert find_format(tiny_tokenizer, " ".join(family.marks)) == family.format


def test_what_names_no_format_has_none(tiny_tokenizer):
    assert find_format(tiny_tokenizer, "{{ messages }}{{ tools }}") is None


LISTED = [
    ('[f(s="x", i=2), get-weather()]', [("f", {"s": "x", "i": 2}), ("get-weather", {})], ""),
    ('<|python_start|>[f(s="x")]<|python_end|>', [("f", {"s": "x"})], ""),
    ("[f(i=2)] Done.", [("f", {"i": 2})], "Done."),
    ("[f(s='x", [("f", {"s": "x"})], ""),
    ("[1] See (there).", [], "[1] See (there)."),
    ("f(s='x')", [], "f(s='x')"),
    ("[other(s='x')]", [], "[other(s='x')]"),
    ("[f(s='x')", [("f", {"s": "x"})], ""),
]


@pytest.mark.parametrize(("text", "calls", "content"), LISTED)
def test_llamas_calls_may_be_a_list_in_python(text, calls, content):
    assert calls_of(FORMATS["llama"], text) == (content, calls)


def test_what_only_begins_like_a_list_of_calls_is_not_held_back():
    parser = ToolCallParser(FORMATS["llama"], TOOLS)
    assert "".join(event.text for event in parser.feed("[1] See")) == "[1] See"
