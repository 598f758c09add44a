"""Printing of one answer as its events come, on plain streams (client/live.py is for a terminal).

Rule 1: the content goes to stdout as the model wrote it, and ends with exactly one newline.
Rule 2: the thinking goes to stderr, so a pipe carries the answer alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from mlxserver.client.events import Content, Event, Finished, Reasoning
from mlxserver.client.models import Wait
from mlxserver.client.views import console, print_status, write
from mlxserver.client.waiting import TICK, Waiting

LINE_START = Control(ControlType.CARRIAGE_RETURN)


class AnswerPrinter:
    """Printer of one answer: the content to stdout, the thinking dim to stderr. content: what was printed so far."""

    def __init__(self) -> None:
        self.content = ""
        self._stderr = console(stderr=True)
        self._answer = Paragraph(write)
        self._thinking = Paragraph(partial(self._stderr.out, style="dim", end="", highlight=False))
        self._progress = StatusLine(self._stderr)
        self._waiting = Waiting()
        self._tick: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Show that the answer is waited for, until its first event. Needs a running event loop."""
        self._waiting = Waiting()
        self._schedule()

    def write(self, event: Event) -> None:
        """Print one event at once. Tool calls are not printed."""
        self._stop_waiting()
        match event:
            case Reasoning(text):
                self._thinking.add(text)
            case Content(text):
                self._thinking.end()
                self._answer.add(text)
                self.content += text
            case Finished("length"):
                self.end()
                print_status("(the answer reached its limit of tokens)")

    def show_progress(self, step: Wait) -> None:
        """Show the progress of what the answer waits for, until the first event."""
        self._waiting.take_progress(step)
        self._progress.show(str(self._waiting))

    def end(self) -> None:
        """End the open lines, also of an answer that stopped halfway."""
        self._stop_waiting()
        self._thinking.end()
        self._answer.end()

    def _schedule(self) -> None:
        self._tick = asyncio.get_running_loop().call_later(TICK, self._show_waiting)

    def _show_waiting(self) -> None:
        self._progress.show(str(self._waiting))
        self._schedule()

    def _stop_waiting(self) -> None:
        if self._tick:
            self._tick.cancel()
        self._tick = None
        self._progress.clear()


class StatusLine:
    """One dim line that can be replaced and removed. Nothing is written where the console is not interactive."""

    def __init__(self, terminal: Console) -> None:
        self._terminal = terminal
        self._width = 0

    def show(self, text: str) -> None:
        """Replace the line. It is cut to the terminal's width."""
        if self._terminal.is_interactive:
            line = text[: self._terminal.width - 1]
            self._terminal.control(LINE_START)
            # Spaces, as an escape sequence is not always allowed.
            self._terminal.out(line.ljust(self._width), style="dim", end="", highlight=False)
            self._width = len(line)

    def clear(self) -> None:
        """Remove the line, if there is one."""
        if self._width:
            self.show("")
            self._terminal.control(LINE_START)


class Paragraph:
    """Text that is written in pieces and ends with exactly one newline, however many it came with."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._is_open = False
        self._newlines = ""

    def add(self, text: str) -> None:
        """Write a piece without the newlines at its end: they are written when more text follows."""
        whole = self._newlines + text
        line = whole.rstrip("\n")
        self._newlines = whole[len(line) :]
        if line:
            self._is_open = True
            self._write(line)

    def end(self) -> None:
        """End the last line. A paragraph without text writes nothing."""
        if self._is_open:
            self._write("\n")
        self._is_open, self._newlines = False, ""
