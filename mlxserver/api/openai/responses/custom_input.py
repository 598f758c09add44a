"""Text of a custom tool's call, out of the JSON arguments of the function that the tool became.

Rule: any cut of the arguments gives the same text. What is no object with that argument is the text as it is.
"""

from __future__ import annotations

import json
import re

from mlxserver.api.openai.responses.items import CUSTOM_ARGUMENT

START = re.compile(rf'\s*\{{\s*"{CUSTOM_ARGUMENT}"\s*:\s*"')
# Whole characters of a JSON string; a surrogate comes as one of a pair.
CHARACTERS = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*'
)


class CustomInput:
    """Decoder of one call: pieces of arguments in, pieces of text out."""

    def __init__(self) -> None:
        self._arguments: list[str] = []
        self._rest = ""
        self._sent = ""
        self._is_inside = False

    def feed(self, piece: str) -> str:
        """The text that a piece of the arguments adds."""
        self._arguments.append(piece)
        self._rest += piece
        if not self._is_inside:
            start = START.match(self._rest)
            if start is None:
                return ""
            self._rest, self._is_inside = self._rest[start.end() :], True
        characters = CHARACTERS.match(self._rest)
        assert characters
        self._rest = self._rest[characters.end() :]
        text = _decoded(f'"{characters.group()}"')
        self._sent += text
        return text

    @property
    def text(self) -> str:
        """The whole text."""
        arguments = "".join(self._arguments)
        try:
            value = json.loads(arguments, strict=False)
        except (ValueError, RecursionError):
            return self._sent if self._is_inside else arguments
        text = value.get(CUSTOM_ARGUMENT) if isinstance(value, dict) else None
        return _unicode(text) if isinstance(text, str) else arguments

    @property
    def remainder(self) -> str:
        """What the pieces so far lack of the whole text."""
        return self.text.removeprefix(self._sent) if self.text.startswith(self._sent) else ""


def _decoded(literal: str) -> str:
    try:
        return _unicode(json.loads(literal, strict=False))
    except ValueError:  # an escape that JSON does not have
        return ""


def _unicode(text: str) -> str:
    """The text without lone surrogates, which no answer can have."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
