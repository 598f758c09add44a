"""What advanced_client.py is made of, where it is pure: every cut, every text, every order."""

import asyncio
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlxserver.client.bench.interference import Interference
from mlxserver.client.bench.plan import Level, Plan, Slo, parse_slo, user
from mlxserver.client.conversation import Conversation
from mlxserver.client.errors import ClientError, LoadFailed, SettingInvalid
from mlxserver.client.events import Content, Usage
from mlxserver.client.live import LiveAnswer, split_blocks, split_lines
from mlxserver.client.models import Loaded, LoadReader, Progress
from mlxserver.client.shell.settings import read_parameter
from mlxserver.client.stats import Timing
from mlxserver.client.stream import StreamReader
from mlxserver.client.transcript import ROLES, format_json, format_markdown, parse_json, parse_markdown
from mlxserver.client.views import format_amount, format_status
from tests.support.scripted_server import LOADS, STREAMS

MARKDOWN_PIECES = [
    "# h\n", "para\n", "\n", "- a\n", "  more\n", "1. x\n", "```\n", "~~~py\n", "| a | b |\n", "|---|---|\n", "> q\n",
    "---\n", "===\n", "    code\n", "<div>\n", "</div>\n", "*b* ", "text", "#", "-", "`", "\t", "<!-- x\n", "-->\n",
    "***\n", "[x]: y\n", "\r\n", "\r", "\x0c",
]  # fmt: skip
LINES = st.sampled_from(["## user", "\\## user", "\\\\## tool", "", "x", "##user", "\r", "## user\r", " "])
TEXTS = st.lists(LINES | st.text(st.characters(exclude_categories=["Cs"]))).map("\n".join)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(MARKDOWN_PIECES), max_size=12).map("".join), st.data())
@pytest.mark.parametrize("split", [split_blocks, split_lines])
def test_any_cut_of_a_text_has_the_same_blocks(split, text, data):
    cut = data.draw(st.integers(0, len(text)))
    first, rest = split(text[:cut])
    more, rest = split(rest + text[cut:])
    assert (first + more, rest) == split(text)


@given(st.lists(st.sampled_from(MARKDOWN_PIECES), max_size=12).map("".join))
def test_blocks_and_rest_are_the_text(text):
    blocks, rest = split_blocks(text)
    assert "".join(blocks) + rest == text


@given(st.lists(st.tuples(st.sampled_from(ROLES), TEXTS)))
def test_a_conversation_survives_both_formats(messages):
    conversation = Conversation(tuple({"role": role, "content": text} for role, text in messages))
    assert parse_json(format_json(conversation)) == conversation
    if messages:
        assert parse_markdown(format_markdown(conversation)) == conversation


@given(st.text())
def test_any_text_as_a_transcript_is_read_or_refused(text):
    for parse in (parse_json, parse_markdown):
        try:
            parse(text)
        except ValueError as error:
            assert str(error)


def test_a_conversation_is_undone_turn_by_turn():
    before = Conversation().with_system("Be brief.").with_turn("Hi", "Ho")
    after = before.with_turn("And?", "Well.")
    assert (after.turns, after.last_question, after.without_last_turn()) == (2, "And?", before)
    assert after.cleared() == Conversation().with_system("Be brief.")
    assert after.with_system("").messages == after.messages[1:]
    assert Conversation().without_last_turn() == Conversation()
    parts = Conversation(({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},))
    assert parts.last_question == "ab"


def test_what_follows_the_end_of_a_stream_is_read_over():
    reader = StreamReader()
    assert [type(e).__name__ for e in reader.feed(b"".join(STREAMS["talker"]) * 2, 1.0)].count("Finished") == 1
    assert list(reader.end(2.0)) == []


@given(st.integers(0, 400))
def test_a_load_is_told_whatever_its_cuts(cut):
    raw, reader = b"".join(LOADS["org/stepwise"]), LoadReader("key")
    events = [*reader.feed(raw[:cut]), *reader.feed(raw[cut:])]
    assert events == [
        Progress("downloading", 1_000_000, 4_000_000),
        Progress("downloading", 4_000_000, 4_000_000),
        Progress("warming"),
        Loaded("stepwise", 2.5),
    ]
    assert [format_amount(event) for event in events[:3]] == ["1.0 MB of 4.0 MB", "4.0 MB of 4.0 MB", ""]


@given(st.binary())
def test_any_bytes_as_a_load_are_events_or_a_client_error(received):
    try:
        assert all(isinstance(event, Progress | Loaded) for event in LoadReader("key").feed(received))
    except ClientError as error:
        assert str(error)


def test_a_load_that_fails_raises_the_servers_words():
    with pytest.raises(LoadFailed, match="no weights"):
        list(LoadReader("key").feed(b"".join(LOADS["org/stumbler"])))


@given(st.text(st.sampled_from("ab*`#-\n |>1. "), max_size=200), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_streamed_answer_looks_like_the_whole_one(text, step):
    """What is printed does not depend on how the text came; only what is drawn in between does."""
    assert shown_lines([text[n : n + step] for n in range(0, len(text), step)]) == shown_lines([text])


def shown_lines(pieces):
    from tools.harness.terminal import pyte

    async def show():
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=40, height=12, legacy_windows=False)
        with LiveAnswer(console) as answer:
            for piece in pieces:
                answer.write(Content(piece))
                answer._draw()
        return out.getvalue()

    screen = pyte.HistoryScreen(40, 12, history=1000)
    pyte.Stream(screen).feed(asyncio.run(show()).replace("\n", "\r\n"))
    gone = ["".join(line[column].data for column in range(40)) for line in screen.history.top]
    return [line.rstrip() for line in [*gone, *screen.display]]


def test_a_plan_is_the_same_for_the_same_seed():
    plan = Plan(("a", "b"), tuple(map(user, "ABC")), concurrency=(1, 4), requests=7, seed=5)
    assert plan.questions() == Plan(("c",), plan.prompts, requests=7, seed=5).questions()
    assert plan.levels == tuple(Level(model, count) for model in ("a", "b") for count in (1, 4))
    arrivals = Plan(("a",), plan.prompts, rates=(50.0,), requests=2000).arrivals(50.0)
    assert arrivals == sorted(arrivals)
    assert 35 < arrivals[-1] < 45


def test_objectives_are_kept_or_not():
    timing = Timing(0.0, 1.0, (0.4, 0.5, 0.6), 0.4, Usage(5, 3))
    assert parse_slo("ttft=500, itl=100.1") == Slo(ttft=0.5, itl=0.1001)
    assert parse_slo("ttft=500,itl=101,e2e=1000").is_met(timing)
    for broken in ("ttft=399", "itl=99", "e2e=999"):
        assert not parse_slo(broken).is_met(timing)
    assert not Slo(itl=1.0).is_met(Timing(0.0, 1.0, (0.4,), 0.4, Usage(5, 1)))


@given(st.text())
def test_any_text_as_objectives_is_read_or_refused(text):
    try:
        assert isinstance(parse_slo(text), Slo)
    except SettingInvalid as error:
        assert "expected milliseconds" in str(error)


def test_a_parameter_is_json_or_a_text():
    assert read_parameter("temperature", "0.5") == {"temperature": 0.5}
    assert read_parameter("stop", '["a"]') == {"stop": ["a"]}
    assert read_parameter("stop", "a b") == {"stop": "a b"}
    for own in ("stream", "messages", "not a name", ""):
        with pytest.raises(SettingInvalid):
            read_parameter(own, "1")


def test_the_figures_of_an_answer_leave_out_what_is_not_known():
    whole = Timing(0.0, 1.0, (0.25, 0.5, 0.75), 0.25, Usage(20, 3, 1, 8))
    expected = "m · 3 tokens (1 thinking) · 4.0 tokens/s · TTFT 250 ms · 8 cached · context 23/100"
    assert format_status("m", whole, 100) == expected
    assert format_status("m", Timing(0.0, 1.0), None) == "m"


def test_long_prompts_differ_from_their_first_word_on():
    interference = Interference(None, Plan(("a",), (user("x"),), concurrency=(1,)), "a", "b")
    one, other = (interference._long_prompt()[0]["content"].split() for _ in range(2))
    assert one[:3] != other[:3]
