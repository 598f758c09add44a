"""What people see. format_* makes it, print_* and AnswerPrinter write it.

Rule 1: the answer goes to stdout as the model wrote it, and ends with exactly one newline.
Rule 2: thinking, status and errors go to stderr, so that a pipe carries the answer alone.
Rule 3: no escape sequence is written where NO_COLOR is set or where the stream is no terminal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from rich.console import Console
from rich.control import Control
from rich.filesize import decimal
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from mlxserver.client.events import Content, Event, Finished, Reasoning
from mlxserver.client.load_view import format_progress
from mlxserver.client.models import Loaded, ModelCard, Unloaded
from mlxserver.client.progress import Progress

COLUMNS = ("key", "state", "type", "memory", "requests", "context", "source")
STATE_STYLES = {"loaded": "green", "loading": "yellow", "draining": "yellow", "failed": "red"}
LINE_START = Control(ControlType.CARRIAGE_RETURN)


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr that keeps rule 3."""
    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False)


def format_models(cards: Sequence[ModelCard]) -> Table:
    """A table of models, for a terminal."""
    table = Table(*COLUMNS, box=None, header_style="bold", pad_edge=False)
    for card in cards:
        key, state, *rest = model_row(card)
        table.add_row(Text(key, "bold"), Text(state, STATE_STYLES.get(state, "")), *map(Text, rest))
    return table


def format_model_lines(cards: Sequence[ModelCard]) -> str:
    """One line a model with the cells of the table between tabs, for a program to read. No header."""
    return "".join("\t".join(" ".join(cell.split()) for cell in model_row(card)) + "\n" for card in cards)


def model_row(card: ModelCard) -> tuple[str, ...]:
    """The cells of one model, in the order of COLUMNS. What the server does not tell is a dash."""
    requests = "-" if card.running is None else f"{card.running} + {card.queued or 0} waiting"
    memory = decimal(card.memory_bytes) if card.memory_bytes else "-"
    context = "-" if card.context_length is None else str(card.context_length)
    return (card.key, card.state or "-", card.type or "-", memory, requests, context, card.source or "-")


def format_loaded(loaded: Loaded) -> str:
    """One line that tells what is ready."""
    return f"Loaded {loaded.key}." if loaded.seconds is None else f"Loaded {loaded.key} in {loaded.seconds:.1f} s."


def format_unloaded(unloaded: Unloaded) -> str:
    """One line that tells what is gone and what came back."""
    return (
        f"Unloaded {unloaded.key}: {unloaded.completed} requests completed, {unloaded.aborted} aborted, "
        f"{decimal(unloaded.freed_bytes)} freed."
    )


def print_models(cards: Sequence[ModelCard]) -> None:
    """The models on stdout: a table on a terminal, tab-separated lines elsewhere."""
    stdout = console()
    if stdout.is_terminal:
        stdout.print(format_models(cards))
    else:
        _write(format_model_lines(cards))


def print_line(text: str) -> None:
    """A result, as one line on stdout."""
    _write(f"{text}\n")


def print_status(text: str, style: str = "dim") -> None:
    """One line on stderr, whatever newlines the text holds."""
    console(stderr=True).out(" ".join(text.split()), style=style, highlight=False)


def print_error(error: Exception) -> None:
    """An error as one line on stderr."""
    print_status(f"error: {error}", style="red")


class AnswerPrinter:
    """Writes one answer as its events come: the content to stdout, the thinking dim to stderr."""

    def __init__(self) -> None:
        self.content = ""
        self._stderr = console(stderr=True)
        self._answer = Paragraph(_write)
        self._thinking = Paragraph(partial(self._stderr.out, style="dim", end="", highlight=False))
        self._waiting = StatusLine(self._stderr)

    def write(self, event: Event) -> None:
        """Write one event at once. Tool calls are not shown."""
        self._waiting.clear()
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

    def tell(self, step: Progress) -> None:
        """Show how far the load is that the answer waits for; gone with the first event."""
        self._waiting.show(format_progress(step))

    def end(self) -> None:
        """End the lines that are open, for an answer that stopped halfway too."""
        self._waiting.clear()
        self._thinking.end()
        self._answer.end()


class StatusLine:
    """One dim line that can be replaced and taken away. Nothing is written where the console can't do that."""

    def __init__(self, terminal: Console) -> None:
        self._terminal = terminal
        self._width = 0

    def show(self, text: str) -> None:
        """Write the line in place of the one before. It is cut to the terminal's width."""
        if self._terminal.is_interactive:
            line = text[: self._terminal.width - 1]
            self._terminal.control(LINE_START)
            # Spaces, as an escape sequence is not always allowed.
            self._terminal.out(line.ljust(self._width), style="dim", end="", highlight=False)
            self._width = len(line)

    def clear(self) -> None:
        """Take the line away, if there is one."""
        if self._width:
            self.show("")
            self._terminal.control(LINE_START)


class Paragraph:
    """Text that comes in pieces and ends with exactly one newline, however many it came with."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._is_open = False
        self._newlines = ""

    def add(self, text: str) -> None:
        """Write a piece, but for the newlines at its end: they are written when more follows."""
        whole = self._newlines + text
        line = whole.rstrip("\n")
        self._newlines = whole[len(line) :]
        if line:
            self._is_open = True
            self._write(line)

    def end(self) -> None:
        """Close the last line. Nothing is written for a paragraph that has no text."""
        if self._is_open:
            self._write("\n")
        self._is_open, self._newlines = False, ""


def _write(text: str) -> None:
    print(text, end="", flush=True)
