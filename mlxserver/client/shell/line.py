"""Input line of the shell: editing, history, completion.

Rule 1: Enter sends. Alt-Enter (or Escape, then Enter) starts a new line; pasted text keeps its lines.
Rule 2: completion sends no request; it offers the models that the session has last seen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mlxserver.client.shell.commands import COMMANDS
from mlxserver.client.shell.session import Session
from mlxserver.client.shell.settings import PARAMETERS

PROMPT = "> "
APPLICATION = "multi-model-mlx-server"


class LineReader:
    """Reader of the lines that are typed into a session."""

    def __init__(self, session: Session) -> None:
        path = history_file()
        if path is None:
            session.note("The history can't be kept: its file can't be written.")
        self._prompt: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation="  ",
            history=FileHistory(str(path)) if path else InMemoryHistory(),
            completer=LineCompleter(session),
            complete_while_typing=False,
            auto_suggest=AutoSuggestFromHistory(),
            key_bindings=_key_bindings(),
            bottom_toolbar=lambda: session.toolbar,
        )

    async def read(self) -> str:
        """The next line. Raises EOFError for Ctrl-D, and KeyboardInterrupt for Ctrl-C."""
        return await self._prompt.prompt_async()


class LineCompleter(Completer):
    """Completion of commands and of their arguments."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Completions of the text before the cursor."""
        typed = document.text_before_cursor
        if not typed.startswith("/") or "\n" in typed:
            return
        name, space, argument = typed[1:].partition(" ")
        if not space:
            yield from _matching((f"/{known}" for known in COMMANDS), typed)
        elif command := COMMANDS.get(name):
            yield from self._arguments(command.completes, argument.lstrip(), complete_event)

    def _arguments(self, kind: str | tuple[str, ...], typed: str, event: CompleteEvent) -> Iterable[Completion]:
        if kind == "path":
            yield from self._paths.get_completions(Document(typed), event)
        elif kind == "models" and " " not in typed:
            yield from _matching(self._session.keys, typed.rpartition(",")[2])
        elif kind == "model":
            yield from _matching(self._session.keys, typed)
        elif kind == "parameter":
            yield from _matching(PARAMETERS, typed)
        elif isinstance(kind, tuple):
            yield from _matching(kind, typed)


def _matching(words: Iterable[str], typed: str) -> Iterable[Completion]:
    return (Completion(word, start_position=-len(typed)) for word in words if word.startswith(typed))


def history_file() -> Path | None:
    """The file of the history, readable by the user alone, in the user's state directory; None if not writable."""
    if sys.platform == "darwin":
        states = Path.home() / "Library" / "Application Support"
    else:
        states = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = states / APPLICATION / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("a"):
            return path
    except OSError:
        return None


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # Enter, if it was typed during an answer: prompt_toolkit did not own the terminal then
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _start_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
