"""Content form: how text and images of a message stand in what a chat template gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.conversation import Image, Message, Text
from mlxserver.engine.requests import ChatPrompt

_WORD = "\u2042 seen \u2042"
_TEXT_PROBE = ChatPrompt((Message("user", (Text(_WORD),)),))
_IMAGE_PROBE = ChatPrompt((Message("user", (Image(b""), Text(_WORD))),))


@dataclass(frozen=True, slots=True)
class ContentForm:
    """Form of content that a template expects. lists_text: a list of parts also where there is text alone.

    placeholder: text in place of an image, for a template that has none for it; "" where it has.
    """

    lists_text: bool = False
    placeholder: str = ""

    def content(self, message: Message, text: str) -> Any:
        """The content of a message. text: all that it has."""
        if self.placeholder and message.images:
            images = "".join(f"{self.placeholder}\n" for _ in message.images)
            return self._text(images + text)
        if message.images and message.result:
            return [_part(Text(text)), *map(_part, message.images)]
        if message.images:
            return [_part(part) for part in message.parts if isinstance(part, Text | Image)]
        return self._text(text)

    def _text(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.lists_text else text


def find_content_form(render: Callable[[ChatPrompt, ContentForm], str | None], placeholder: str) -> ContentForm:
    """The form with which a template shows text, and an image as this placeholder."""
    forms = [ContentForm(lists_text, own) for lists_text in (False, True) for own in ("", placeholder)]
    for form in forms:
        text, seen = render(_TEXT_PROBE, form) or "", render(_IMAGE_PROBE, form) or ""
        if _WORD in text and _WORD in seen and seen.count(placeholder) == 1:
            return form
    return ContentForm(placeholder=placeholder)


def _part(part: Text | Image) -> dict[str, str]:
    return {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
