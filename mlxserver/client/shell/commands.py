"""Commands of the shell: their names, their arguments, and the functions that run them.

Rule 1: a line that begins with a slash is a command; its argument is the rest of the line.
Rule 2: a command that fails raises ClientError, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from mlxserver.client.errors import SettingInvalid
from mlxserver.client.shell import measuring, models, settings, talking
from mlxserver.client.shell.session import Leave, Session, expected_one_of
from mlxserver.client.views import wrapped

Argument = Literal["", "model", "models", "path", "parameter"]


@dataclass(frozen=True, slots=True)
class Command:
    """One command. completes: what Tab completes its argument to, a kind of argument or the words themselves."""

    name: str
    usage: str
    description: str
    run: Callable[[Session, str], Awaitable[None]]
    completes: Argument | tuple[str, ...] = ""


async def help_(session: Session, argument: str) -> None:
    """List the commands and keys."""
    room = session.stdout.width
    for command in COMMANDS.values():
        line = f"  {command.usage:<28} {command.description}"
        session.stdout.out(wrapped(line, room, min(31, room // 4)), highlight=False)
    session.note("Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, Ctrl-D leaves.")


async def clear(session: Session, argument: str) -> None:
    """Clear the screen; the conversation stays."""
    session.stdout.clear()


async def quit_(session: Session, argument: str) -> None:
    """Leave the shell."""
    raise Leave


def _commands() -> Iterator[Command]:
    yield Command("models", "/models", "the server's models", models.list_models)
    yield Command("model", "/model NAME", "talk to another model", models.choose_model, "model")
    yield Command("load", "/load NAME [KEY]", "load a model: a registered key, or a source", models.load, "model")
    yield Command("unload", "/unload KEY", "unload a model when its requests are done", models.unload, "model")
    yield Command("stream", "/stream on|off", "answers as they are made, or whole", settings.stream, ("on", "off"))
    yield Command("compare", "/compare a,b[,c] [PROMPT]", "ask several models at once", measuring.compare_, "models")
    yield Command("new", "/new", "a new conversation", talking.new)
    yield Command("system", "/system [TEXT]", "set the system message, or remove it", talking.system)
    yield Command("set", "/set [NAME [VALUE]]", "a parameter of requests", settings.set_, "parameter")
    yield Command("think", "/think show|hide|collapse", "how thinking is shown", settings.think, settings.VIEWS)
    yield Command("retry", "/retry", "ask the last question again", talking.retry)
    yield Command("undo", "/undo", "forget the last turn", talking.undo)
    yield Command("save", "/save FILE", "keep the conversation as .json or .md", talking.save, "path")
    yield Command("open", "/open FILE", "go on with a conversation from .json or .md", talking.open_, "path")
    yield Command("file", "/file PATH", "put a file into the next question", talking.file, "path")
    yield Command("image", "/image [FILE]", "put an image into the next question", talking.image, "path")
    yield Command("bench", "/bench [KEY,KEY] [OPTIONS]", "measure speed under load", measuring.bench, "models")
    yield Command("stats", "/stats", "the figures of this session", measuring.stats)
    yield Command("clear", "/clear", "clear the screen", clear)
    yield Command("help", "/help", "this list", help_)
    yield Command("quit", "/quit", "leave", quit_)


COMMANDS = {command.name: command for command in _commands()}


async def run_line(session: Session, line: str) -> None:
    """Run a line: a command, or a question. Raises ClientError, and Leave."""
    if not line.startswith("/"):
        return await session.send(line)
    name, _, argument = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise SettingInvalid("command", f"/{name}", expected_one_of(f"/{name}", [f"/{known}" for known in COMMANDS]))
    return await command.run(session, argument.strip())
