"""Grammars of custom tools as patterns: what is said by one, and what is not."""

import re

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.api.openai.responses.custom_grammar import pattern_of
from mlxserver.api.openai.responses.dialect import ResponsesDialect
from mlxserver.config.settings import Settings

PATCH = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk
add_hunk: "*** Add File: " filename LF add_line+  // a new file
delete_hunk: "*** Delete File: " filename LF
filename: /(.+)/
add_line: "+" /(.*)/ LF -> line
%import common.LF
"""
CASES = [
    (PATCH,
     ["*** Begin Patch\n*** Add File: a\n+x\n*** End Patch", "*** Begin Patch\n*** Delete File: a\n*** End Patch\n"],
     ["", "x", "*** Begin Patch\n*** End Patch", "*** Begin Patch\n*** Add File: a\n*** End Patch"]),
    ('start: "a" | "b" "c"?', ["a", "b", "bc"], ["ac", "c", ""]),
    ('start: A~2..3 "x"i ["b".."d"]\nA: /[0-9]/', ["12x", "123Xc"], ["1x", "12xe", "1234x"]),
    ('?start: (WORD | "1.5")+ // any\nWORD.2: /[a-z]/i', ["a1.5B"], ["1x5", "-"]),
    ("start: INT | NAME\n%import common.INT\n%import common.CNAME -> NAME", ["12", "a_1"], ["1a"]),
    ('start: "a\\"b" /x\\/y/', ['a"bx/y'], ["a"]),
    ('start: a | a\na: "x"\n  | "y"', ["x", "y"], ["xy"]),
]  # fmt: skip
NONE = [
    'start: "a" start | "b"', "start: other", "start: A\n%ignore /\\s+/\nA: /x/", 'start: "a', "start: (", "",
    "start: )", "start: x{A}\nx{y}: y", "start: A\n%import python.A", 'start: "ab".."c"', 'start: "a"~99999',
    'start: "a" ~ b', 'start[lazy]: "a"', 'start: %json {"type": "object"}',
]  # fmt: skip


def request(**form):
    tool = {"type": "custom", "name": "play", "description": "Plays.", "format": {"type": "grammar", **form}}
    body = {"model": "m", "input": "x", "tools": [{"type": "custom", "name": "free"}, tool]}
    return ResponsesDialect(Settings()).parse(orjson.dumps(body))


@pytest.mark.parametrize(("grammar", "fit", "unfit"), CASES)
def test_a_grammar_that_is_not_recursive_is_a_pattern(grammar, fit, unfit):
    pattern = pattern_of("lark", grammar)
    for text in fit:
        assert re.search(python(pattern), text)
    for text in unfit:
        assert not re.search(python(pattern), text)


def python(pattern):
    """The pattern as Python takes it, whose $ also matches before a last line break."""
    return re.sub(r"\\x\{(\w+)\}", lambda found: re.escape(chr(int(found[1], 16))), pattern).removesuffix("$") + r"\Z"


@pytest.mark.parametrize("grammar", NONE)
def test_what_no_pattern_says_has_none(grammar):
    assert pattern_of("lark", grammar) is None
    assert request(syntax="lark", definition=grammar or " ").ignored == ("tools[1].format",)


def test_a_grammar_that_grows_without_bound_has_no_pattern():
    rules = [f"r{n}: r{n + 1} r{n + 1}" for n in range(40)]
    assert pattern_of("lark", "\n".join(["start: r0", *rules, 'r40: "x"'])) is None


def test_a_custom_tool_is_held_to_its_pattern_and_the_model_reads_the_grammar():
    call = request(syntax="regex", definition="[a-h][1-8]|O-O")
    free, play = call.requests[0].prompt.tools
    assert call.ignored == ()
    assert (free.held, free.is_strict) == (None, False)
    assert play.schema["properties"]["input"]["pattern"] == "^(?:[a-h][1-8]|O-O)$"
    assert (play.is_strict, play.strict_origin) == (True, "tools[1].format")
    assert play.function.keys() == {"name", "description", "parameters"}
    assert "[a-h][1-8]|O-O" in play.description and "pattern" not in play.parameters["properties"]["input"]


@given(st.text(alphabet='start: "ab"/x/()[]|?*+~.->\n%', max_size=40))
def test_any_text_is_a_grammar_or_none(text):
    pattern = pattern_of("lark", "start: " + text)
    assert pattern is None or pattern.startswith("^(?:")
