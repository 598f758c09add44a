"""Volatile lines: what programs write into a conversation anew with each request, and no model needs.

The prefix cache would end where such a line stands. They are left out of every prompt, in whatever dialect it came.

Rule 1: this list is the only one. A pattern matches the line alone: text beside it on the same line stays.
Rule 2: an answer of the model, a call and a tool's result are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from mlxserver.engine.conversation import Message, Part, Text

# Claude Code's first part of the system message; other parts may have been joined to it without a line break.
_BILLING = re.compile(r"\Ax-anthropic-billing-header:(?:[ \t]*[\w-]+=[^;\s]*(?:;|(?=\s|\Z)))*[ \t]*\n*")
# A counter of the tokens that are left.
_TOTAL_TOKENS = re.compile(r"^[ \t]*<total_tokens>[^<\n]*\d[^<\n]*</total_tokens>[ \t]*(?:\n|\Z)", re.MULTILINE)

_LINES: dict[str, tuple[re.Pattern[str], ...]] = {
    "system": (_BILLING, _TOTAL_TOKENS),
    "developer": (_BILLING, _TOTAL_TOKENS),
    "user": (_TOTAL_TOKENS,),
}


def without_volatile_lines(messages: Iterable[Message]) -> Iterator[Message]:
    """The messages without their volatile lines, and without a system message of nothing else."""
    for message in messages:
        parts = tuple(_stable(message))
        if parts or not message.parts or message.role == "user":
            yield message if parts == message.parts else replace(message, parts=parts)


def _stable(message: Message) -> Iterator[Part]:
    patterns = _LINES.get(message.role, ())
    for part in message.parts:
        if not isinstance(part, Text):
            yield part
            continue
        text = part.text
        for pattern in patterns:
            text = pattern.sub("", text)
        if text or not part.text:
            yield part if text == part.text else Text(text)
