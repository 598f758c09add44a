"""A conversation as a value: every change gives a new one. Pure.

Rule 1: a system message is the first one, or there is none.
Rule 2: a turn is a user message and all that follows it up to the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxserver.client.wire import mappings, text

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """OpenAI's messages in their order."""

    messages: tuple[Message, ...] = ()

    @property
    def system(self) -> str:
        """The system message's text; empty when there is none."""
        first = self.messages[0] if self.messages else {}
        return content_text(first) if first.get("role") == "system" else ""

    @property
    def turns(self) -> int:
        """How many questions were asked."""
        return sum(message.get("role") == "user" for message in self.messages)

    @property
    def last_question(self) -> str | None:
        """What was asked last; None before the first question."""
        return next((content_text(m) for m in reversed(self.messages) if m.get("role") == "user"), None)

    def with_system(self, text: str) -> Conversation:
        """The same with another system message; an empty text removes it."""
        rest = self.messages[1:] if self.system else self.messages
        return replace(self, messages=(*([{"role": "system", "content": text}] if text else []), *rest))

    def asking(self, question: str) -> list[Message]:
        """The messages of a request that asks one more question."""
        return [*self.messages, {"role": "user", "content": question}]

    def with_turn(self, question: str, answer: str) -> Conversation:
        """The same with one turn more."""
        turn = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return replace(self, messages=self.messages + turn)

    def without_last_turn(self) -> Conversation:
        """The same before its last question."""
        places = [place for place, message in enumerate(self.messages) if message.get("role") == "user"]
        return replace(self, messages=self.messages[: places[-1]] if places else self.messages)

    def cleared(self) -> Conversation:
        """A new conversation under the same system message."""
        return Conversation().with_system(self.system)


def content_text(message: Message) -> str:
    """The text of a message whose content is a string, a list of parts, or null."""
    content = message.get("content")
    return text(content) or "".join(text(part.get("text")) for part in mappings(content))
