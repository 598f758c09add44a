"""Live view of an answer: any cut of the text has the same complete blocks, and prints the same lines."""

import asyncio
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlxserver.client.events import Content
from mlxserver.client.live import LiveAnswer, split_blocks, split_lines
from tools.harness.terminal import pyte

MARKDOWN_PIECES = [
    "# h\n", "para\n", "\n", "- a\n", "  more\n", "1. x\n", "```\n", "~~~py\n", "| a | b |\n", "|---|---|\n", "> q\n",
    "---\n", "===\n", "    code\n", "<div>\n", "</div>\n", "*b* ", "text", "#", "-", "`", "\t", "<!-- x\n", "-->\n",
    "***\n", "[x]: y\n", "\r\n", "\r", "\x0c",
]  # fmt: skip


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


@given(st.text(st.sampled_from("ab*`#-\n |>1. "), max_size=200), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_streamed_answer_is_printed_like_a_whole_one(text, step):
    """The printed lines do not depend on the deltas; only what is drawn meanwhile does."""
    assert shown_lines([text[n : n + step] for n in range(0, len(text), step)]) == shown_lines([text])


def shown_lines(deltas):
    async def show():
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=40, height=12, legacy_windows=False)
        with LiveAnswer(console) as answer:
            for delta in deltas:
                answer.write(Content(delta))
                answer.draw()
        return out.getvalue()

    screen = pyte.HistoryScreen(40, 12, history=1000)
    pyte.Stream(screen).feed(asyncio.run(show()).replace("\n", "\r\n"))
    gone = ["".join(line[column].data for column in range(40)) for line in screen.history.top]
    return [line.rstrip() for line in [*gone, *screen.display]]
