"""Conversations in files, as JSON or Markdown, and files quoted in a prompt.

Rule 1: what is saved opens as the same conversation, whatever its text, as long as every content is a text, or texts
        and images in data URLs.
Rule 2: in Markdown each message follows a line `## ROLE`, and an image is a line `![image](data:...)`. A line of a text
        that reads like one of these, or like an escaped one, is escaped by one more backslash.
Rule 3: the format of a conversation's file is the end of its name: .json or .md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from mlxserver.client.conversation import Conversation, Message, content_text
from mlxserver.client.errors import FileUnusable, SettingInvalid
from mlxserver.client.images import Content, Part, image_urls
from mlxserver.client.wire import mappings, text

ROLES = ("system", "developer", "user", "assistant", "tool")
HEADING = re.compile(rf"^## ({'|'.join(ROLES)})$", re.MULTILINE)
IMAGE = re.compile(r"^!\[image\]\((data:image/[a-z]+;base64,[A-Za-z0-9+/=]*)\)$", re.MULTILINE)
MARK = rf"(?:## (?:{'|'.join(ROLES)})|!\[image\]\(data:image/[a-z]+;base64,[A-Za-z0-9+/=]*\))$"
LOOKS_LIKE_MARK = re.compile(rf"^(?=\\*{MARK})", re.MULTILINE)
ESCAPED_MARK = re.compile(rf"^\\(?=\\*{MARK})", re.MULTILINE)
BLANK_LINE = "\n\n"


def save(path: Path, conversation: Conversation) -> None:
    """Write a conversation. Raises SettingInvalid for a name of neither format, FileUnusable."""
    write = {".json": format_json, ".md": format_markdown}[_format(path)]
    try:
        path.expanduser().write_text(write(conversation), encoding="utf-8", newline="")
    except (OSError, ValueError) as error:
        raise FileUnusable(str(path), _cause(error)) from error


def load(path: Path) -> Conversation:
    """Read a conversation. Raises SettingInvalid for a name of neither format, FileUnusable."""
    parse = {".json": parse_json, ".md": parse_markdown}[_format(path)]
    try:
        return parse(read_text(path))
    except ValueError as error:
        raise FileUnusable(str(path), str(error)) from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file with its line ends as they are. Raises FileUnusable."""
    try:
        with path.expanduser().open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise FileUnusable(str(path), "it is no UTF-8 text") from error
    except (OSError, ValueError) as error:
        raise FileUnusable(str(path), _cause(error)) from error


def quote_file(path: Path) -> str:
    """A file's name, and its text in a fence that the text can't close. Raises FileUnusable."""
    text = read_text(path)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{path.name}:\n{fence}\n{text.removesuffix(chr(10))}\n{fence}"


def format_json(conversation: Conversation) -> str:
    """Messages as a request has them."""
    return json.dumps({"messages": list(conversation.messages)}, indent=2) + "\n"


def parse_json(text: str) -> Conversation:
    """Messages of a request's body, or of a bare list. Raises ValueError."""
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
    """A document with one section per message."""
    return "".join(_section(message) for message in conversation.messages)


def parse_markdown(text: str) -> Conversation:
    """Messages of a document of format_markdown(), edited by hand or not. Raises ValueError if there is none."""
    before, *parts = HEADING.split(text)
    if not parts or before.strip():
        raise ValueError(f"expected sections that begin with a line such as {'## user'!r}")
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return Conversation(tuple({"role": role, "content": _content(section)} for role, section in pairs))


def _section(message: Message) -> str:
    return f"## {message['role']}\n\n{BLANK_LINE.join(_blocks(message))}\n\n"


def _blocks(message: Message) -> Iterator[str]:
    """The text of a message, or its texts and images in order."""
    content = message.get("content")
    if not any(image_urls(content)):
        yield LOOKS_LIKE_MARK.sub(r"\\", content_text(message))
        return
    for part in mappings(content):
        if url := next(image_urls([part]), ""):
            yield f"![image]({url})"
        else:
            yield LOOKS_LIKE_MARK.sub(r"\\", text(part.get("text")))


def _content(section: str) -> Content:
    """The content of a section without the line ends that _section() put around it."""
    whole = section.removeprefix("\n").removeprefix("\n").removesuffix("\n").removesuffix("\n")
    texts, urls = IMAGE.split(whole)[::2], IMAGE.findall(whole)
    if not urls:
        return ESCAPED_MARK.sub("", whole)
    parts: list[Part] = []
    for number, written in enumerate(texts):
        if number:
            parts.append({"type": "image_url", "image_url": {"url": urls[number - 1]}})
            written = written.removeprefix(BLANK_LINE)
        if written := written.removesuffix(BLANK_LINE) if number < len(urls) else written:
            parts.append({"type": "text", "text": ESCAPED_MARK.sub("", written)})
    return parts


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _format(path: Path) -> str:
    if path.suffix.lower() not in (".json", ".md"):
        raise SettingInvalid("file", str(path), "a name that ends in .json or .md")
    return path.suffix.lower()


def _cause(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
