"""Reasoning and answer are kept apart, however the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.reasoning_formats import THINK
from mlxserver.engine.output.thinking import ThinkingParser


def parse(pieces, starts_inside=False, may_close_twice=False, call_starts=()):
    """The whole reasoning and the whole content."""
    parser = ThinkingParser(THINK, starts_inside, may_close_twice=may_close_twice, call_starts=call_starts)
    emitted = [part for piece in pieces for part in parser.feed(piece)] + parser.flush()
    assert all(text for _, text in emitted)
    return tuple("".join(text.text for channel, text in emitted if channel == c) for c in ("reasoning", "content"))


@pytest.mark.parametrize(
    ("text", "starts_inside", "reasoning", "content"),
    [
        ("<think>a</think>b", False, "a", "b"),
        ("\n <think>\n a b \n</think>\n\n b c ", False, "a b", "b c "),
        ("a </think>\n b", True, "a", "b"),
        ("<think>\na</think>b", True, "a", "b"),
        ("<think>never closed ", False, "never closed ", ""),
        ("never closed", True, "never closed", ""),
        ("<think></think>b", False, "", "b"),
        (" just an answer", False, "", " just an answer"),
        ("write <think>x</think> so", False, "", "write <think>x</think> so"),
        ("<think>a</think>b <think>c</think>", False, "a", "b <think>c</think>"),
        ("a < b </thin> c</think>d", True, "a < b </thin> c", "d"),
        ("<thin", False, "", "<thin"),
        ("<think>a</thi", False, "a</thi", ""),
        ("  ", False, "", "  "),
        ("", False, "", ""),
    ],
)
def test_text_is_split_at_the_tags(text, starts_inside, reasoning, content):
    assert parse([text], starts_inside) == (reasoning, content)
    assert parse(text, starts_inside) == (reasoning, content)


FRAGMENTS = st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", " ", "\n", "a", "b c", "é", "<call>"])
STARTS = st.sampled_from([(), ("<call>",)])


@given(st.lists(FRAGMENTS, max_size=12), st.lists(st.integers(0, 80)), st.booleans(), st.booleans(), STARTS)
def test_any_cut_gives_the_same_channels(fragments, cuts, starts_inside, may_close_twice, call_starts):
    text = "".join(fragments)
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    options = (starts_inside, may_close_twice, call_starts)
    assert parse(pieces, *options) == parse([text], *options) == parse(text, *options)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<think>a</think>\n</think>b", "b"),
        ("<think>a</think>b\n</think>\n\nc", "b\nc"),
        ("<think>a</think>b</think>c</think>d", "bc</think>d"),
        ("<think>a</think>b</thi", "b</thi"),
    ],
)
def test_where_the_reasoning_may_have_been_closed_for_the_model_its_own_closing_tag_is_dropped(text, content):
    assert parse([text], may_close_twice=True) == ("a", content)
    assert parse(text, may_close_twice=True) == ("a", content)


CALL = "<call>f</call>"


@pytest.mark.parametrize(
    ("text", "starts_inside", "reasoning", "content"),
    [
        (f"a\n{CALL}", True, "a", f"\n{CALL}"),
        (f"<think>a\n{CALL} b", False, "a", f"\n{CALL} b"),
        (CALL, True, "", CALL),
        (f"a {CALL} b {CALL}", True, "a", f" {CALL} b {CALL}"),
        (f"a {CALL} b\n</think>\nc", True, f"a {CALL} b", "c"),
        (f"a {CALL}</think>{CALL}", True, f"a {CALL}", CALL),
        ("a <call", True, "a <call", ""),
        ("a <ca </call>", True, "a <ca </call>", ""),
        (f"a</think>b {CALL}", True, "a", f"b {CALL}"),
    ],
)
def test_a_call_in_reasoning_that_is_never_closed_is_content(text, starts_inside, reasoning, content):
    for pieces in ([text], text, *([text[:at], text[at:]] for at in range(len(text)))):
        assert parse(pieces, starts_inside, call_starts=("<call>", "<other>")) == (reasoning, content)


def test_a_call_in_the_reasoning_is_held_back():
    parser = ThinkingParser(THINK, True, call_starts=("<call>",), call_end="</call>")
    pieces = ("a", " <cal", "l>", "f", "</call>", "\n", "<cal", "l>g", "</call>", "b", "</think>")
    states = []
    for piece in pieces:
        emitted = "".join(text.text for _, text in parser.feed(piece))
        states.append((emitted, parser.holds_call, parser.is_calling))
    assert states == [
        ("a", False, False),
        ("", True, False),
        *[("", True, True)] * 7,
        ("", True, False),
        (" <call>f</call>\n<call>g</call>b", False, False),
    ]


def test_only_what_may_be_a_tag_is_held_back():
    parser = ThinkingParser(THINK, False)
    pieces = ("<think>", "\nfirst", " second <", "b", "</think>", "answer <think")
    assert [parser.feed(piece) for piece in pieces] == [
        [],
        [("reasoning", TokenText("first"))],
        [("reasoning", TokenText(" second"))],
        [("reasoning", TokenText(" <b"))],
        [],
        [("content", TokenText("answer <think"))],
    ]
    assert parser.flush() == []


def test_the_parser_shows_whether_the_output_is_inside_the_reasoning():
    assert ThinkingParser(THINK, True).is_thinking
    parser = ThinkingParser(THINK, False)
    states = [(parser.feed(piece), parser.is_thinking)[1] for piece in ("<thi", "nk>", "a", "</think>", "b")]
    assert states == [False, True, True, False, False]
