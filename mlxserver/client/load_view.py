"""The loading of a model: a bar, or words, that tell how far it is."""

from __future__ import annotations

from contextlib import aclosing

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mlxserver.client.api import ChatClient
from mlxserver.client.errors import StreamBroken
from mlxserver.client.models import Loaded
from mlxserver.client.progress import Progress as Step

BYTE_STAGES = ("downloading", "reading")


async def load_with_bar(client: ChatClient, console: Console, source: str, key: str | None) -> Loaded:
    """Load a model and show each step; only the result where the console is no terminal. Raises ClientError."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"Loading {key or source}", total=None, amount="")
        async with aclosing(client.load_stepwise(source, key)) as events:
            async for event in events:
                if isinstance(event, Loaded):
                    return event
                bar.update(task, description=f"{event.stage.capitalize()} {key or source}", amount=format_amount(event))
                bar.update(task, completed=event.done or 0, total=event.total)
    raise StreamBroken("the load ended without a word on how.")


def format_amount(step: Step) -> str:
    """How much is done, in bytes or in things; empty where it is not known of how much."""
    if step.done is None or step.total is None:
        return ""
    write = decimal if step.stage in BYTE_STAGES else str
    return f"{write(int(step.done))} of {write(int(step.total))}"


def format_progress(step: Step) -> str:
    """A step in words on one line, for an answer that waits for its model."""
    stage = " ".join(step.stage.split()) or "begun"
    return ", ".join(part for part in (f"The model is being loaded: {stage}", format_amount(step)) if part)
