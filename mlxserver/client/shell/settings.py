"""Commands about the settings of requests and the view of answers."""

from __future__ import annotations

import json
from typing import Any, get_args

from mlxserver.client.errors import SettingInvalid
from mlxserver.client.live import ThinkingView
from mlxserver.client.shell.session import Session

VIEWS: tuple[ThinkingView, ...] = get_args(ThinkingView)

# Tab completes to these; other parameters of the server's are sent as well.
PARAMETERS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "reasoning_effort",
)  # fmt: skip
OWN = ("model", "messages", "stream", "stream_options")


async def stream(session: Session, argument: str) -> None:
    """Stream answers, or show them whole."""
    if argument not in ("on", "off"):
        raise SettingInvalid("/stream", argument, "on or off")
    session.streams = argument == "on"
    session.note(f"Streaming is {argument}.")


async def think(session: Session, argument: str) -> None:
    """Show thinking above the answer, hide it, or collapse it to a line."""
    for view in VIEWS:
        if view == argument:
            session.thinking = view
            return session.note(f"Thinking: {view}.")
    raise SettingInvalid("/think", argument, "show, hide or collapse")


async def set_(session: Session, argument: str) -> None:
    """Set a parameter, remove it, or list all that are set."""
    name, _, value = argument.partition(" ")
    if value.strip():
        session.params |= read_parameter(name, value.strip())
    elif name and session.params.pop(name, None) is None:
        raise SettingInvalid("/set", name, "NAME VALUE, or the name of a parameter that is set")
    session.note(
        ", ".join(f"{key} = {json.dumps(value)}" for key, value in session.params.items()) or "Nothing is set."
    )


def read_parameter(name: str, value: str) -> dict[str, Any]:
    """Parse a parameter: its value is JSON, or else text. Raises SettingInvalid for one that the client sets itself."""
    if name in OWN or not name.isidentifier():
        raise SettingInvalid("parameter", name, f"one of a request, such as {', '.join(PARAMETERS[:3])}")
    try:
        return {name: json.loads(value)}
    except (ValueError, RecursionError):
        return {name: value}
