"""Output of the command lines. format_* is pure, print_* writes one result or one status line.

Rule 1: results go to stdout, status and errors to stderr, so a pipe carries the result alone.
Rule 2: no escape sequence is written where NO_COLOR is set or the stream is no terminal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import aclosing
from textwrap import wrap

from rich import progress
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from mlxserver.client.api import ChatClient
from mlxserver.client.errors import StreamBroken
from mlxserver.client.events import Usage
from mlxserver.client.models import Loaded, ModelCard, Prefill, Progress, QueuePosition, Unloaded, Wait
from mlxserver.client.stats import Timing
from mlxserver.client.tables import fitted

COLUMNS = ("key", "state", "type", "memory", "requests", "context", "source")
SPARE = ("requests", "type", "context", "source")  # columns that a narrow terminal does not show
BYTE_STAGES = ("downloading", "reading")


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr that follows rule 2."""
    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False)


def format_models(cards: Sequence[ModelCard], room: int) -> Table:
    """A table of models, for a terminal with so many characters per line."""
    return fitted(COLUMNS, [model_row(card) for card in cards], room, SPARE)


def format_model_lines(cards: Sequence[ModelCard]) -> str:
    """One line per model with the cells of the table between tabs, for programs. No header."""
    return "".join("\t".join(" ".join(cell.split()) for cell in model_row(card)) + "\n" for card in cards)


def model_row(card: ModelCard) -> tuple[str, ...]:
    """The cells of one model, in the order of COLUMNS. A dash stands for what the server does not report."""
    requests = "-" if card.running is None else f"{card.running} + {card.queued or 0} waiting"
    memory = decimal(card.memory_bytes) if card.memory_bytes else "-"
    context = "-" if card.context_length is None else str(card.context_length)
    return (card.key, card.state or "-", card.type or "-", memory, requests, context, card.source or "-")


def format_loaded(loaded: Loaded) -> str:
    """The result of a load in one line."""
    return f"Loaded {loaded.key}." if loaded.seconds is None else f"Loaded {loaded.key} in {loaded.seconds:.1f} s."


def format_unloaded(unloaded: Unloaded) -> str:
    """The result of an unload in one line."""
    return (
        f"Unloaded {unloaded.key}: {unloaded.completed} requests completed, {unloaded.aborted} aborted, "
        f"{decimal(unloaded.freed_bytes)} freed."
    )


def format_progress(step: Wait) -> str:
    """What an answer waits for, in one line."""
    match step:
        case QueuePosition(position):
            return "Waiting for a free slot" + (f", number {position:.0f} in the queue" if position else "")
        case Prefill(done, total):
            return "The prompt is being read" + (f": {done:.0f} of {total:.0f} tokens" if done and total else "")
        case Progress(stage):
            stage = " ".join(stage.split()) or "begun"
            return ", ".join(part for part in (f"The model is being loaded: {stage}", format_amount(step)) if part)


def format_amount(step: Progress) -> str:
    """How much of a load's stage is done, in bytes or in items; empty if not known."""
    if step.done is None or step.total is None:
        return ""
    write = decimal if step.stage in BYTE_STAGES else str
    return f"{write(int(step.done))} of {write(int(step.total))}"


def format_status(model: str, timing: Timing, context_length: int | None) -> str:
    """Model, tokens, tokens/s, TTFT, cached tokens and context used by an answer; what is not known is left out."""
    parts = [model]
    if usage := timing.usage:
        thinking = f" ({usage.reasoning_tokens} thinking)" if usage.reasoning_tokens else ""
        parts.append(f"{usage.completion_tokens} tokens{thinking}")
    if timing.tokens_per_second is not None:
        parts.append(f"{timing.tokens_per_second:.1f} tokens/s")
    if timing.ttft is not None:
        parts.append(f"TTFT {timing.ttft * 1000:.0f} ms")
    if usage:
        parts.append(f"{usage.cached_tokens} cached")
        parts.append(f"context {format_context(usage, context_length)}")
    return " · ".join(parts)


def format_context(usage: Usage, context_length: int | None) -> str:
    """Tokens of the conversation so far, over the most there may be."""
    used = usage.prompt_tokens + usage.completion_tokens
    return f"{used}/{context_length}" if context_length else str(used)


async def load_with_bar(client: ChatClient, terminal: Console, source: str, key: str | None) -> Loaded:
    """Load a model and show its progress where the console is a terminal. Raises ClientError."""
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[amount]}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(f"Loading {key or source}", total=None, amount="")
        async with aclosing(client.load_stepwise(source, key)) as events:
            async for event in events:
                if isinstance(event, Loaded):
                    return event
                bar.update(task, description=f"{event.stage.capitalize()} {key or source}", amount=format_amount(event))
                bar.update(task, completed=event.done or 0, total=event.total)
    raise StreamBroken("the load ended without a result.")


def print_models(cards: Sequence[ModelCard]) -> None:
    """Print models on stdout: a table on a terminal, tab-separated lines elsewhere."""
    stdout = console()
    if stdout.is_terminal:
        stdout.print(format_models(cards, stdout.width))
    else:
        write(format_model_lines(cards))


def print_line(text: str) -> None:
    """Print a result as one line on stdout."""
    write(f"{text}\n")


def print_status(text: str, style: str = "dim") -> None:
    """Print one line on stderr, whatever newlines the text has; a terminal gets it in lines of whole words."""
    terminal, line = console(stderr=True), " ".join(text.split())
    terminal.out(wrapped(line, terminal.width) if terminal.is_terminal else line, style=style, highlight=False)


def wrapped(line: str, width: int, indent: int = 0) -> str:
    """A line in lines of whole words; a command in backquotes stays whole. indent: of all lines but the first."""
    kept = re.sub("`[^`]*`", lambda command: command[0].replace(" ", "\0"), line)
    lines = wrap(kept, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def print_error(error: Exception) -> None:
    """Print an error as one line on stderr."""
    print_status(f"error: {error}", style="red")


def write(text: str) -> None:
    """Write to stdout at once."""
    print(text, end="", flush=True)
