"""Conversation as an immutable value: every change returns a new one. Pure.

Rule 1: a system message is the first message, or there is none.
Rule 2: a turn is a user message and all messages up to the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxserver.client.images import Content
from mlxserver.client.wire import mappings, text

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of OpenAI's API in their order."""

    messages: tuple[Message, ...] = ()

    @property
    def system(self) -> str:
        """The text of the system message; empty if there is none."""
        first = self.messages[0] if self.messages else {}
        return content_text(first) if first.get("role") == "system" else ""

    @property
    def turns(self) -> int:
        """Number of turns."""
        return sum(message.get("role") == "user" for message in self.messages)

    @property
    def last_question(self) -> str | None:
        """The last user message's text; None before the first."""
        return next((content_text(m) for m in reversed(self.messages) if m.get("role") == "user"), None)

    @property
    def last_content(self) -> Content | None:
        """The last user message's content, its images included; None before the first."""
        return next((m.get("content") for m in reversed(self.messages) if m.get("role") == "user"), None)

    def with_system(self, text: str) -> Conversation:
        """The conversation with another system message; an empty text removes it."""
        rest = self.messages[1:] if self.system else self.messages
        return replace(self, messages=(*([{"role": "system", "content": text}] if text else []), *rest))

    def asking(self, question: Content) -> list[Message]:
        """The messages of a request with one more question."""
        return [*self.messages, {"role": "user", "content": question}]

    def with_turn(self, question: Content, answer: str) -> Conversation:
        """The conversation with one more turn."""
        turn = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return replace(self, messages=self.messages + turn)

    def without_last_turn(self) -> Conversation:
        """The conversation before its last turn."""
        starts = [index for index, message in enumerate(self.messages) if message.get("role") == "user"]
        return replace(self, messages=self.messages[: starts[-1]] if starts else self.messages)

    def cleared(self) -> Conversation:
        """A new conversation with the same system message."""
        return Conversation().with_system(self.system)


def content_text(message: Message) -> str:
    """The text of a message whose content is a string, a list of parts, or null."""
    content = message.get("content")
    return text(content) or "".join(text(part.get("text")) for part in mappings(content))
