"""An answer on a terminal as it comes: finished parts are printed once, and only the last few lines are drawn again.

Rule 1: a line that was printed is never touched again, so that a long answer neither flickers nor jumps.
Rule 2: what is drawn again fits on the screen. A block that is taller gives up its top lines: they are printed.
Rule 3: drawing waits for FRAME seconds, so that the speed of the tokens is not the speed of the terminal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text

from mlxserver.client.blocks import split_blocks, split_lines
from mlxserver.client.events import Content, Event, Finished, Reasoning
from mlxserver.client.load_view import format_progress
from mlxserver.client.progress import Progress

FRAME = 0.05
FOLDED_LINES = 4

ThinkingView = Literal["show", "hide", "collapse"]
Line = list[Segment]


class GrowingText:
    """One text at the bottom of the terminal. height: how many lines may be drawn again."""

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
        """More of the text; draw() shows it."""
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
        """Print all that is left."""
        self.draw()
        self._live.update("")
        self._print_block(self._rest)
        self._rest = ""

    def drop(self) -> None:
        """Take away what is drawn, without printing it."""
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


class LiveAnswer:
    """Shows one answer: the thinking dim above it, the answer as Markdown. Needs a running event loop."""

    def __init__(self, console: Console, thinking: ThinkingView = "show") -> None:
        self._view = thinking
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        height = max(4, console.height - 4)
        folded = FOLDED_LINES if thinking == "collapse" else height
        self._thinking = GrowingText(self._live, lambda text: Text(text, "dim"), split_lines, folded)
        self._answer = GrowingText(self._live, Markdown, split_blocks, height, gap=1)
        self._thought: tuple[float, float] | None = None  # when it began, and when its last piece came
        self._frame: asyncio.TimerHandle | None = None

    def __enter__(self) -> LiveAnswer:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._frame:
            self._frame.cancel()
        self._end_thinking()
        self._answer.end()
        self._live.stop()

    def write(self, event: Event) -> None:
        """Show one event, at the next frame at the latest. Tool calls are not shown."""
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
            self._frame = asyncio.get_running_loop().call_later(FRAME, self._draw)

    def tell(self, step: Progress) -> None:
        """Draw how far the load is that the answer waits for. The answer is drawn in its place."""
        line = Text(format_progress(step), "dim", no_wrap=True, overflow="ellipsis")
        self._live.update(line, refresh=True)

    def _draw(self) -> None:
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
    """Lines without the empty ones around them. A line with a colour behind it is not empty."""
    kept = [
        place for place, line in enumerate(lines) if any(s.text.strip() or (s.style and s.style.bgcolor) for s in line)
    ]
    return lines[kept[0] : kept[-1] + 1] if kept else []


def _renderable(lines: list[Line]) -> RenderableType:
    """Lines as they are, each ended; nothing for none."""
    return Segments([segment for line in lines for segment in (*line, Segment.line())])
