"""Scanner of a tool call in JSON, while the model writes it.

Rule 1: any cut of the same text gives the same name and arguments; arguments are emitted once the name is known.
Rule 2: the arguments are the model's own JSON text. Inside them only brackets and strings are followed.
Rule 3: what was emitted stays valid: a call can be malformed only before its arguments, or behind them, where it no
        longer matters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum

from mlxserver.engine.output.call_reading import Reading, solid

NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters")


class ScanState(Enum):
    """How far a call has been read."""

    READING = "more is needed"
    WHOLE = "the call is complete"
    MALFORMED = "this is no call"


class CallScanner:
    """Scanner of one {"name": ..., "arguments": {...}}, in any order and with other keys between, from behind its "{".

    A call without arguments has {}; arguments in a JSON string are taken out of it.
    """

    def __init__(self) -> None:
        self.name = ""
        self.has_arguments = False
        self.state = ScanState.READING
        self._untaken: list[str] = []
        self._object = self._read_object()
        next(self._object)

    def feed(self, text: str) -> int:
        """The number of characters that belong to the call: all, unless it ends there or turns out to be none."""
        for position, char in enumerate(text):
            try:
                self._object.send(char)
            except StopIteration:
                self.state = ScanState.WHOLE
                return position + 1
            except (ValueError, RecursionError):
                is_known = self.name and self.has_arguments
                self.state = ScanState.WHOLE if is_known else ScanState.MALFORMED
                return position
        return len(text)

    def take_arguments(self) -> str:
        """The text of the arguments that came since it was last taken; empty while the name is not known."""
        if not self.name:
            return ""
        arguments = "".join(self._untaken)
        self._untaken.clear()
        return arguments

    def _read_object(self) -> Reading[None]:
        char = yield from solid()
        while char != "}":
            key = yield from string(char)
            if (yield from solid()) != ":":
                raise ValueError
            char = yield from self._read_value(key, (yield from solid()))
            if char == ",":
                char = yield from solid()
            elif char != "}":
                raise ValueError
        if not self.name:
            raise ValueError
        if not self.has_arguments:
            self._untaken.append("{}")
            self.has_arguments = True

    def _read_value(self, key: str, first: str) -> Reading[str]:
        """Read the value that begins with `first`; the character behind it."""
        if key in NAMES and not self.name:
            self.name = yield from string(first)
            if not self.name:
                raise ValueError
        elif key in ARGUMENTS and not self.has_arguments:
            yield from self._read_arguments(first)
        elif first in "{[":
            yield from container(first, lambda _: None)
        elif first == '"':
            yield from string(first)
        else:
            return (yield from _behind_scalar(first))
        return (yield from solid())

    def _read_arguments(self, first: str) -> Reading[None]:
        if first == "{":
            yield from container(first, self._untaken.append)
        else:
            text = yield from string(first)
            if not isinstance(json.loads(text), dict):
                raise ValueError
            self._untaken.append(text)
        self.has_arguments = True


def sendable(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which a JSON escape can write and UTF-8 can't encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def string(first: str) -> Reading[str]:
    """The string that begins with the quote `first`."""
    if first != '"':
        raise ValueError
    chars, is_escaped = [first], False
    while True:
        char = yield
        chars.append(char)
        if char == '"' and not is_escaped:
            return sendable(json.loads("".join(chars)))
        if char < " ":
            raise ValueError
        is_escaped = char == "\\" and not is_escaped


def container(first: str, keep: Callable[[str], None]) -> Reading[None]:
    """Read the object or array that begins with `first`, and pass each of its characters to `keep`.

    A line break that a string has as it is, which JSON does not allow, is passed as its escape.
    """
    char, depth, in_string, is_escaped = first, 0, False, False
    while True:
        keep(json.dumps(char)[1:-1] if in_string and char < " " else char)
        if in_string:
            in_string = is_escaped or char != '"'
            is_escaped = char == "\\" and not is_escaped
        elif char == '"':
            in_string = True
        else:
            depth += (char in "{[") - (char in "}]")
        if depth == 0:
            return
        char = yield


def _behind_scalar(char: str) -> Reading[str]:
    """Pass a number or a literal that begins with `char`; the character behind it."""
    while not char.isspace() and char not in ",}":
        if not (char.isalnum() or char in "+-."):
            raise ValueError
        char = yield
    return (yield from solid()) if char.isspace() else char
