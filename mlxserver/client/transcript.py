"""Conversations in files: JSON as the API has messages, or Markdown for people.

Rule 1: what is saved opens as the same conversation, whatever its text, as long as every content is a text.
Rule 2: in Markdown each message follows a line `## ROLE`. A line of a message that reads like one, or like one that
        was escaped, gets a backslash more.
Rule 3: a file's name ends in .json or .md, and that is its format.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from mlxserver.client.conversation import Conversation, Message, content_text
from mlxserver.client.errors import FileUnusable, SettingInvalid

ROLES = ("system", "developer", "user", "assistant", "tool")
HEADING = re.compile(rf"^## ({'|'.join(ROLES)})$", re.MULTILINE)
LOOKS_LIKE_HEADING = re.compile(rf"^(?=\\*## (?:{'|'.join(ROLES)})$)", re.MULTILINE)
ESCAPED_HEADING = re.compile(rf"^\\(?=\\*## (?:{'|'.join(ROLES)})$)", re.MULTILINE)


def save(path: Path, conversation: Conversation) -> None:
    """Write a conversation. Raises SettingInvalid for a name that tells no format, FileUnusable."""
    write = {".json": format_json, ".md": format_markdown}[_format(path)]
    try:
        path.expanduser().write_text(write(conversation), encoding="utf-8", newline="")
    except (OSError, ValueError) as error:
        raise FileUnusable(str(path), _cause(error)) from error


def load(path: Path) -> Conversation:
    """Read a conversation. Raises SettingInvalid for a name that tells no format, FileUnusable."""
    parse = {".json": parse_json, ".md": parse_markdown}[_format(path)]
    try:
        return parse(read_text(path))
    except ValueError as error:
        raise FileUnusable(str(path), str(error)) from error


def read_text(path: Path) -> str:
    """The text of a file, as it is. Raises FileUnusable."""
    try:
        with path.expanduser().open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise FileUnusable(str(path), "it is no UTF-8 text") from error
    except (OSError, ValueError) as error:
        raise FileUnusable(str(path), _cause(error)) from error


def format_json(conversation: Conversation) -> str:
    """The messages as a request has them."""
    return json.dumps({"messages": list(conversation.messages)}, indent=2) + "\n"


def parse_json(text: str) -> Conversation:
    """Messages from a request's body, or a bare list of them. Raises ValueError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from None
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError('expected {"messages": [...]}, each message with a "role" and a "content"')
    return Conversation(tuple(messages))


def format_markdown(conversation: Conversation) -> str:
    """A section a message."""
    return "".join(_section(message) for message in conversation.messages)


def parse_markdown(text: str) -> Conversation:
    """The messages of what format_markdown made, edited by hand or not. Raises ValueError when there is none."""
    before, *parts = HEADING.split(text)
    if not parts or before.strip():
        raise ValueError(f"expected sections that begin with a line such as {'## user'!r}")
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return Conversation(tuple({"role": role, "content": _content(section)} for role, section in pairs))


def _section(message: Message) -> str:
    content = LOOKS_LIKE_HEADING.sub(r"\\", content_text(message))
    return f"## {message['role']}\n\n{content}\n\n"


def _content(section: str) -> str:
    """A section's text without the two line ends before and after it, where they are."""
    return ESCAPED_HEADING.sub("", section.removeprefix("\n").removeprefix("\n").removesuffix("\n").removesuffix("\n"))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _format(path: Path) -> str:
    if path.suffix.lower() not in (".json", ".md"):
        raise SettingInvalid("file", str(path), "a name that ends in .json or .md")
    return path.suffix.lower()


def _cause(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
