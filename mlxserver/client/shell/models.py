"""Commands about the server's models."""

from __future__ import annotations

import shlex

from mlxserver.client.errors import SettingInvalid
from mlxserver.client.shell.session import Session
from mlxserver.client.views import format_loaded, format_models, format_unloaded, load_with_bar


async def list_models(session: Session, argument: str) -> None:
    """Show a table of all models."""
    session.stdout.print(format_models(await session.refresh(), session.stdout.width))


async def choose_model(session: Session, argument: str) -> None:
    """Switch to another model, in the same conversation."""
    if not argument:
        return session.note(f"model: {session.model}")
    await session.choose(argument)
    return session.note(f"Now talking to {session.model}.")


async def load(session: Session, argument: str) -> None:
    """Load a registered model by its key, or any source under a new key."""
    source, key = _split(argument)
    for card in await session.refresh():
        if key is None and card.key == source:
            # The source and the key of a registered model load that model.
            source, key = card.source or source, card.key
    loaded = await load_with_bar(session.client, session.stdout, source, key)
    await session.refresh()
    session.note(format_loaded(loaded), "green")


async def unload(session: Session, argument: str) -> None:
    """Unload a model when its requests are done."""
    if not argument:
        raise SettingInvalid("/unload", argument, "the KEY of a model")
    with session.stdout.status(f"Unloading {argument} ..."):
        unloaded = await session.client.unload(argument)
    await session.refresh()
    session.note(format_unloaded(unloaded), "green")


def _split(argument: str) -> tuple[str, str | None]:
    try:
        parts = shlex.split(argument)
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 2:
        raise SettingInvalid("/load", argument, "NAME [KEY]")
    return parts[0], parts[1] if len(parts) == 2 else None
