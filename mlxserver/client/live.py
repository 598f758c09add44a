"""Live view of an answer on a terminal: complete blocks are printed once, and only the last lines are drawn again.

Rule 1: a line that was printed is never touched again, so a long answer neither flickers nor jumps.
Rule 2: what is drawn again fits on the screen. The top lines of a taller block are printed.
Rule 3: drawing waits for FRAME seconds, so the terminal does not slow the tokens down.
Rule 4: a block of Markdown is complete when a complete line has begun the next one. CommonMark reads line by line, and
        no later line changes a block that is closed, so a complete block can be printed once and for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from markdown_it import MarkdownIt
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text

from mlxserver.client.events import Content, Event, Finished, Reasoning
from mlxserver.client.models import Wait
from mlxserver.client.waiting import TICK, Waiting

FRAME = 0.05
COLLAPSED_LINES = 4
# The parser that rich renders with.
PARSER = MarkdownIt().enable("strikethrough").enable("table")

ThinkingView = Literal["show", "hide", "collapse"]
Line = list[Segment]


def split_blocks(text: str) -> tuple[list[str], str]:
    """The complete blocks of a Markdown text, and the rest that may still change. Together they are the text."""
    lines = text.split("\n")
    complete = lines[:-1]
    # A carriage return alone would be a line to the parser, and the lines are counted by line feeds here.
    tokens = PARSER.parse("\n".join(complete).replace("\r", " ")) if complete else []
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]
    cuts = [0, *starts[1:]]
    blocks = ["".join(f"{line}\n" for line in lines[cut:end]) for cut, end in pairwise(cuts)]
    return blocks, "\n".join(lines[cuts[-1] :])


def split_lines(text: str) -> tuple[list[str], str]:
    """The complete lines of a plain text, and the rest."""
    *lines, rest = text.split("\n")
    return lines, rest


class GrowingText:
    """Text that grows at the bottom of the terminal. height: how many of its lines may be drawn again."""

    def __init__(
        self,
        live: Live,
        render: Callable[[str], RenderableType],
        split: Callable[[str], tuple[list[str], str]],
        height: int,
        gap: int = 0,
    ) -> None:
        self._live, self._render, self._split = live, render, split
        self._height, self._gap = height, gap
        self._rest = ""
        self._printed = 0  # lines of the block in _rest
        self._blocks = 0

    def add(self, text: str) -> None:
        """Append text; draw() shows it."""
        self._rest += text

    def draw(self) -> None:
        """Print what is complete, and draw the rest."""
        blocks, self._rest = self._split(self._rest)
        for block in blocks:
            self._print_block(block)
        lines = self._lines(self._rest)
        overflow = len(lines) - self._height
        if overflow > self._printed:
            self._print(lines[self._printed : overflow])
            self._printed = overflow
        self._live.update(_renderable(lines[self._printed :]), refresh=True)

    def end(self) -> None:
        """Print the rest."""
        self.draw()
        self._live.update("")
        self._print_block(self._rest)
        self._rest = ""

    def drop(self) -> None:
        """Remove what is drawn, without printing it."""
        self._rest = ""
        self._live.update("", refresh=True)

    def tail(self) -> None:
        """Draw the last lines and print none."""
        self._live.update(_renderable(self._lines(self._rest)[-self._height :]), refresh=True)

    def _print_block(self, block: str) -> None:
        lines = self._lines(block)
        self._print(lines[self._printed :])
        self._printed = 0
        self._blocks += bool(lines)

    def _lines(self, text: str) -> list[Line]:
        console = self._live.console
        lines = _trimmed(console.render_lines(self._render(text), pad=False)) if text.strip() else []
        gap: list[Line] = [[Segment("")]] * self._gap if lines and self._blocks else []
        return gap + lines

    def _print(self, lines: list[Line]) -> None:
        if lines:
            self._live.console.print(_renderable(lines), end="")


class _FootedLive(Live):
    """Live display with a dim line at its bottom. footer: its text; empty for no line."""

    def __init__(self, console: Console, footer: Callable[[], str]) -> None:
        self._footer = footer
        super().__init__(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")

    def get_renderable(self) -> RenderableType:
        """What is drawn: the text, then the line."""
        text, drawn = self._footer(), super().get_renderable()
        line = Text(text, "dim", no_wrap=True, overflow="ellipsis")
        return Group(*([drawn] if drawn else []), line) if text else drawn


class LiveAnswer:
    """Live view of one answer: the thinking dim above, the content as Markdown. Needs a running event loop."""

    def __init__(self, console: Console, thinking: ThinkingView = "show") -> None:
        self._view = thinking
        self._waiting = Waiting()
        self._tick: asyncio.TimerHandle | None = None  # while the answer is not complete
        self._live = _FootedLive(console, self._footer)
        height = max(4, console.height - 4)
        thinking_height = COLLAPSED_LINES if thinking == "collapse" else height
        self._thinking = GrowingText(self._live, lambda text: Text(text, "dim"), split_lines, thinking_height)
        self._answer = GrowingText(self._live, Markdown, split_blocks, height, gap=1)
        self._thought: tuple[float, float] | None = None  # arrivals of its first and last delta
        self._frame: asyncio.TimerHandle | None = None

    def __enter__(self) -> LiveAnswer:
        self._live.start()
        self._waiting = Waiting()
        self._schedule()
        return self

    def __exit__(self, *error: object) -> None:
        for timer in (self._frame, self._tick):
            if timer:
                timer.cancel()
        self._tick = None
        self._end_thinking()
        self._answer.end()
        self._live.stop()

    def write(self, event: Event) -> None:
        """Show one event, at the next frame at the latest. Tool calls are not shown."""
        self._waiting.take(event)
        match event:
            case Reasoning(text, at):
                self._thought = (self._thought[0] if self._thought else at, at)
                self._thinking.add(text)
            case Content(text):
                self._end_thinking()
                self._answer.add(text)
            case Finished("length"):
                self._answer.add("\n\n*(the answer reached its limit of tokens)*\n")
        if not self._frame:
            self._frame = asyncio.get_running_loop().call_later(FRAME, self.draw)

    def show_progress(self, step: Wait) -> None:
        """Draw the progress of what the answer waits for. The answer replaces it."""
        self._waiting.take_progress(step)
        self._live.refresh()

    def _footer(self) -> str:
        """What is below the answer while it is not complete."""
        return str(self._waiting) if self._tick else ""

    def _schedule(self) -> None:
        self._tick = asyncio.get_running_loop().call_later(TICK, self._draw_footer)

    def _draw_footer(self) -> None:
        self._schedule()
        self._live.refresh()

    def draw(self) -> None:
        """Draw all events so far, without waiting for the next frame."""
        if self._frame:
            self._frame.cancel()
        self._frame = None
        if not self._thought:
            self._answer.draw()
        elif self._view == "show":
            self._thinking.draw()
        elif self._view == "collapse":
            self._thinking.tail()
        else:
            self._thinking.drop()

    def _end_thinking(self) -> None:
        if not self._thought:
            return
        began, ended = self._thought
        self._thought = None
        if self._view == "show":
            self._thinking.end()
            self._live.console.print()
            return
        self._thinking.drop()
        if self._view == "collapse":
            self._live.console.print(Text(f"▸ thought for {ended - began:.1f} s\n", "dim italic"))


def _trimmed(lines: list[Line]) -> list[Line]:
    """Lines without the empty ones around them. A line with a background colour is not empty."""
    kept = [
        index for index, line in enumerate(lines) if any(s.text.strip() or (s.style and s.style.bgcolor) for s in line)
    ]
    return lines[kept[0] : kept[-1] + 1] if kept else []


def _renderable(lines: list[Line]) -> RenderableType:
    """Lines, each with a line end."""
    return Segments([segment for line in lines for segment in (*line, Segment.line())])
