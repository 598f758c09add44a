"""Commands that change how questions are asked and answers are shown."""

from __future__ import annotations

import json
from typing import Any, get_args

from mlxserver.client.errors import SettingInvalid
from mlxserver.client.live import ThinkingView
from mlxserver.client.shell.session import Session

VIEWS: tuple[ThinkingView, ...] = get_args(ThinkingView)

# What Tab offers; any other name that the server knows is sent as well.
PARAMETERS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "reasoning_effort",
)  # fmt: skip
OWN = ("model", "messages", "stream", "stream_options")


async def stream(session: Session, argument: str) -> None:
    """Show answers as they are made, or whole."""
    if argument not in ("on", "off"):
        raise SettingInvalid("/stream", argument, "on or off")
    session.streams = argument == "on"
    session.note(f"Streaming is {argument}.")


async def think(session: Session, argument: str) -> None:
    """Show thinking above the answer, hide it, or fold it into a line."""
    for view in VIEWS:
        if view == argument:
            session.thinking = view
            return session.note(f"Thinking: {view}.")
    raise SettingInvalid("/think", argument, "show, hide or collapse")


async def set_(session: Session, argument: str) -> None:
    """Set a parameter, remove it, or list what is set."""
    name, _, value = argument.partition(" ")
    if value.strip():
        session.params |= read_parameter(name, value.strip())
    elif name and session.params.pop(name, None) is None:
        raise SettingInvalid("/set", name, "NAME VALUE, or the name of a parameter that is set")
    session.note(
        ", ".join(f"{key} = {json.dumps(value)}" for key, value in session.params.items()) or "Nothing is set."
    )


def read_parameter(name: str, value: str) -> dict[str, Any]:
    """A parameter whose value is JSON, or else a text. Raises SettingInvalid for one that is the client's own."""
    if name in OWN or not name.isidentifier():
        raise SettingInvalid("parameter", name, f"one of a request, such as {', '.join(PARAMETERS[:3])}")
    try:
        return {name: json.loads(value)}
    except (ValueError, RecursionError):
        return {name: value}
