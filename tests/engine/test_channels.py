"""Messages with headers are split into reasoning, answer and calls, however the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.engine.events import TokenLogprob, ToolCallDelta
from mlxserver.engine.output.channels import ChannelParser
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.reasoning_formats import HARMONY, RECIPIENTS

ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"


def parse(pieces, marks=HARMONY, starts_inside=False, tools=(), parallel=True):
    """The whole reasoning, the whole content, and each call as (name, arguments)."""
    parser = ChannelParser(marks, starts_inside, tools=tools, parallel=parallel, index=2)
    texts, calls = {"reasoning": "", "content": ""}, []
    for piece in [piece for text in pieces for piece in parser.feed(text)] + parser.flush():
        if isinstance(piece, ToolCallDelta):
            assert piece.index == 2
            assert piece.arguments
            assert bool(piece.id) is bool(piece.name)
            if piece.id:
                assert piece.call == len(calls)
                calls.append((piece.name, ""))
            calls[piece.call] = (calls[piece.call][0], calls[piece.call][1] + piece.arguments)
        else:
            assert piece[1].text
            texts[piece[0]] += piece[1].text
    return texts["reasoning"], texts["content"], calls


def every_cut(text, **options):
    """What all cuts of a text in two, and its single characters, give."""
    whole = parse([text], **options)
    assert parse(text, **options) == whole
    for at in range(len(text)):
        assert parse([text[:at], text[at:]], **options) == whole
    return whole


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        (f"{FINAL}Hello\nthere.", "", "Hello\nthere."),
        ("<|channel|>commentary<|message|>Hello", "", "Hello"),
        (f"{ANALYSIS}I'm\nthinking{NEXT}{FINAL}Hello<|return|>", "I'm\nthinking", "Hello"),
        (f"{ANALYSIS}I'm thinking", "I'm thinking", ""),
        (f"{ANALYSIS}a{NEXT}{ANALYSIS}b{NEXT}{FINAL}c", "a\n\nb", "c"),
        (f"{ANALYSIS}a{NEXT}<|channel|>commentary<|message|>One moment.{NEXT}{FINAL}c", "a", "One moment.\n\nc"),
        (f'{ANALYSIS}a{NEXT}<|channel|>final <|constrain|>json<|message|>{{"a": 1}}', "a", '{"a": 1}'),
        (f"<|channel|>commentary to=assistant{ANALYSIS}a{NEXT}{FINAL}b", "a", "b"),
        (f"<|start|>assistant{ANALYSIS}a{NEXT}{FINAL}b", "a", "b"),
        # What is missing is done without.
        ("Hello", "", "Hello"),
        (" to", "", " to"),
        ("  ", "", "  "),
        ("", "", ""),
        (f"Hello<|end|>{ANALYSIS}a", "a", "Hello"),
        (f"{ANALYSIS}a<|end|>{FINAL}b", "a", "b"),
        (f"{ANALYSIS}a{FINAL}b", "a", "b"),
        (f"{ANALYSIS}a<|start|>assistant{FINAL}b", "a", "b"),
        (f"{ANALYSIS}a<|end|> \nb", "a", "b"),
        (f"{ANALYSIS}a{NEXT}", "a", ""),
        (f"{ANALYSIS}a{NEXT}<|channel|>fi", "a", ""),
        (f"{ANALYSIS}a<|en", "a<|en", ""),
        ("<|channel|>final Hello", "", "Hello"),
        ("<|channel|>analysis\nHello<|end|>", "Hello", ""),
        (f"<|channel|>final {'so ' * 200}", "", "so " * 200),
        (f"<|message|>Hello{NEXT}<|message|>b", "", "Hello\n\nb"),
        (f"<|end|><|end|>{FINAL}a < b <|end|>", "", "a < b "),
        ("to be", "", "to be"),
        ("to= nothing<|end|>", "", "to= nothing"),
    ],
)
def test_a_message_goes_to_the_channel_of_its_header(text, reasoning, content):
    assert every_cut(text) == (reasoning, content, [])


ARGUMENTS = '{"city": "Oslo", "days": [1, 2]}'
CALL = ("get_weather", ARGUMENTS)


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}", "", "", [CALL]),
        (f"<|channel|>commentary to=functions.get_weather<|message|>{ARGUMENTS}<|call|>", "", "", [CALL]),
        (f"<|channel|>analysis to=functions.get_weather code<|message|>{ARGUMENTS}", "", "", [CALL]),
        (f" to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}", "", "", [CALL]),
        (f" to=functions.get_weather<|channel|>analysis <|constrain|>json<|message|>{ARGUMENTS}", "", "", [CALL]),
        (f" to=get_weather<|channel|>commentary<|message|>{ARGUMENTS}", "", "", [CALL]),
        (
            f"{ANALYSIS}a{NEXT} to=functions.get_weather<|channel|>commentary json<|message|>\n{ARGUMENTS}\n<|call|>",
            "a",
            "",
            [CALL],
        ),
        (
            f"{ANALYSIS}a{NEXT}<|channel|>commentary<|message|>One moment.{NEXT}"
            f"<|channel|>commentary to=functions.get_weather<|message|>{ARGUMENTS}<|call|>"
            f"<|start|>assistant<|channel|>commentary to=functions.other.one<|message|>{{}}",
            "a",
            "One moment.",
            [CALL, ("other.one", "{}")],
        ),
        ("<|channel|>commentary to=functions.f<|message|><|call|>", "", "", [("f", "{}")]),
        ("<|channel|>commentary to=functions.f<|message|>  ", "", "", [("f", "{}")]),
        ('<|channel|>commentary to=functions.f<|message|>{"a": "cu', "", "", [("f", '{"a": "cu')]),
        ("<|channel|>commentary to=functions.f<|message|>no JSON <|call|>", "", "", [("f", "no JSON")]),
        ("<|channel|>commentary to=python<|message|>print(1)", "", "print(1)", []),
        ("<|channel|>analysis to=python<|message|>print(1)", "print(1)", "", []),
    ],
)
def test_the_recipient_of_a_message_makes_it_a_call(text, reasoning, content, calls):
    assert every_cut(text, tools=("get_weather",)) == (reasoning, content, calls)


def test_without_tools_there_are_no_calls():
    text = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    assert every_cut(text) == ("", "{}", [])


def test_without_parallel_calls_only_the_first_is_emitted():
    text = "<|channel|>commentary to=functions.f<|message|>{}<|call|>" * 2
    assert every_cut(text, tools=("f",), parallel=False) == ("", "", [("f", "{}")])


def test_arguments_are_emitted_while_they_come():
    parser = ChannelParser(HARMONY, tools=("f",))
    assert parser.feed("<|channel|>commentary to=functions.f<|message|>") == []
    (first,) = parser.feed('{"a": ')
    assert (first.call, first.name, first.arguments) == (0, "f", '{"a":')
    assert parser.feed('"b') == [ToolCallDelta(0, ' "b')]
    assert parser.feed('"}\n') == [ToolCallDelta(0, '"}')]
    assert parser.feed("<|call|>") == []
    assert parser.flush() == []


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        (" to=user<|message|>Hello<|eot|>", "", "Hello"),
        (" to=self<|message|>I could.<|eom|><|start|>assistant to=user<|message|>Hello<|eot|>", "I could.", "Hello"),
        (
            " to=user<|message|>Hi.<|eom|><|start|>assistant to=f<|message|><atem:function_calls>",
            "",
            "Hi.\n\n<atem:function_calls>",
        ),
        ("Hello", "", "Hello"),
    ],
)
def test_recipients_alone_can_be_the_channels(text, reasoning, content):
    assert every_cut(text, marks=RECIPIENTS, tools=("f",)) == (reasoning, content, [])


FRAGMENTS = st.sampled_from(
    [ANALYSIS, FINAL, NEXT, "<|start|>assistant", "<|channel|>", "<|message|>", "<|call|>", " to=functions.f", " ",
     "\n", "a", "b c", "<|", "{}", "commentary", "<|constrain|>json", "x" * 100, "<|end|>", "<|return|>", "to="]
)  # fmt: skip


@given(st.lists(FRAGMENTS, max_size=12), st.lists(st.integers(0, 600)), st.booleans(), st.sampled_from([(), ("f",)]))
def test_any_cut_gives_the_same_pieces(fragments, cuts, starts_inside, tools):
    text = "".join(fragments)
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    options = {"starts_inside": starts_inside, "tools": tools}
    assert parse(pieces, **options) == parse([text], **options) == parse(text, **options)


def test_a_prompt_may_end_inside_a_message():
    assert every_cut(f" more{NEXT}{FINAL}Hello", starts_inside=True) == (" more", "Hello", [])


def test_the_parser_shows_whether_the_output_is_inside_the_reasoning():
    parser = ChannelParser(HARMONY)
    pieces = (ANALYSIS, "a", "<|e", "nd|>", "<|start|>assistant", FINAL, "b")
    states = [(parser.feed(piece), (parser.is_thinking, parser.is_closing))[1] for piece in pieces]
    assert states == [(True, False), (True, False), (True, True), *[(False, False)] * 4]
    assert ChannelParser(HARMONY, True).is_thinking


def test_a_token_stays_with_the_text_that_is_emitted():
    names = [TokenLogprob(str(n), b"", 0.0) for n in range(4)]
    parser = ChannelParser(HARMONY)
    texts = [ANALYSIS, "a", f"{NEXT}{FINAL}", "b"]
    pieces = [parser.feed(TokenText(text, ((0, name),))) for text, name in zip(texts, names, strict=True)]
    assert pieces[1] == [("reasoning", TokenText("a", ((0, names[1]),)))]
    assert pieces[3] == [("content", TokenText("b", ((0, names[3]),)))]
