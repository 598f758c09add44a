"""Limits of one request.

Rule 1: limits are checked on the JSON as it came, before anything is made from it; the number of its values even before
        it is read: sixteen megabytes of empty lists keep the event loop busy for seconds.
Rule 2: a refusal names the parameter, what was found in it, and the limit.
Rule 3: an image is no text of the prompt. It has limits of its own, where its bytes are known (server/image_urls.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxserver.api.schema.parameters import ValidationFailed
from mlxserver.config.settings import Settings

PROMPT_FIELDS = (
    *("messages", "prompt", "tokens", "input", "instructions"),
    *("tools", "chat_template_kwargs", "response_format", "text"),
    *("system", "output_config", "format"),
)
TOKEN_BYTES = 4  # of a token id in a prompt
IMAGE_FIELDS = {"image_url": "image_url", "input_image": "image_url", "image": "source"}  # by the type of a part


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper limits. values: commas and opening brackets of a body, those in its text included.

    depth: lists and objects inside each other. prompt_bytes: UTF-8 of all that a prompt is made from. stops: stop
    strings. biases: tokens in logit_bias. choices: n. ignores_unknown: unknown parameters are ignored, not refused.
    """

    values: int = 500_000
    depth: int = 64
    messages: int = 4096
    prompt_bytes: int = 2 << 20
    stops: int = 16
    biases: int = 1024
    choices: int = 16
    ignores_unknown: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The limits that the settings state."""
        return cls(
            values=settings.max_json_values,
            depth=settings.max_json_depth,
            messages=settings.max_messages,
            prompt_bytes=settings.max_prompt_bytes,
            stops=settings.max_stop_strings,
            biases=settings.max_logit_bias,
            choices=settings.max_choices,
            ignores_unknown=settings.unknown_parameters == "ignore",
        )

    def check_body(self, body: bytes) -> None:
        """Check a body that has not been read. Raises ValidationFailed."""
        values = sum(body.count(mark) for mark in b",[{")
        if values > self.values:
            found = f"has {values} commas and opening brackets"
            raise ValidationFailed(f"The body {found}. Expected at most {self.values}, the limit of this server.")

    def check(self, document: Mapping[str, Any], body_bytes: int) -> None:
        """Check a request, which was read from so many bytes. Raises ValidationFailed."""
        self._check_depth(document)
        options = document.get("options")  # of Ollama
        for param, value, limit, things in (
            ("messages", document.get("messages"), self.messages, "messages"),
            ("input", document.get("input"), self.messages, "items"),
            ("stop", document.get("stop"), self.stops, "strings"),
            ("stop_sequences", document.get("stop_sequences"), self.stops, "strings"),
            ("options.stop", options.get("stop") if isinstance(options, dict) else None, self.stops, "strings"),
            ("logit_bias", document.get("logit_bias"), self.biases, "tokens"),
        ):
            if isinstance(value, list | dict) and len(value) > limit:
                raise _over(param, f"has {len(value)} {things}", limit)
        for param in ("n", "best_of"):
            value = document.get(param)
            if isinstance(value, int | float) and value > self.choices:
                raise _over(param, f"is {value}", self.choices)
        if body_bytes > self.prompt_bytes:  # no prompt is longer than its JSON
            self._check_prompt(document)

    def _check_depth(self, document: Mapping[str, Any]) -> None:
        level: list[Any] = [document]
        for _ in range(self.depth):
            level = [item for value in level for item in _items(value) if isinstance(item, list | dict)]
            if not level:
                return
        raise ValidationFailed(
            f"The body has more than {self.depth} lists and objects inside each other, the limit of this server."
        )

    def _check_prompt(self, document: Mapping[str, Any]) -> None:
        sizes = {
            param: _text_bytes(document[param]) - _image_bytes(document[param])
            for param in PROMPT_FIELDS
            if param in document
        }
        if sum(sizes.values()) > self.prompt_bytes:
            param = max(sizes, key=lambda name: sizes[name])
            raise _over(param, f"makes the prompt {sum(sizes.values())} bytes long", self.prompt_bytes)


def _over(param: str, found: str, limit: int) -> ValidationFailed:
    return ValidationFailed(f"'{param}' {found}. Expected at most {limit}, the limit of this server.", param)


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _image_bytes(value: Any) -> int:
    """What of the text in messages, items and their parts is images, in base64 or named by URLs."""
    if not isinstance(value, list):
        return 0
    total = 0
    for item in value:
        if isinstance(item, dict):
            kind, images = item.get("type"), item.get("images")  # images: of Ollama
            total += _text_bytes(item.get(IMAGE_FIELDS[kind])) if isinstance(kind, str) and kind in IMAGE_FIELDS else 0
            total += _text_bytes(images) if isinstance(images, list) and "role" in item else 0
            total += sum(_image_bytes(item.get(name)) for name in ("content", "output"))
    return total


def _text_bytes(value: Any) -> int:
    """UTF-8 of all text in a value, which is not deep, and what its numbers stand for as tokens."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, dict):
        return sum(_text_bytes(key) + _text_bytes(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(_text_bytes(item) for item in value)
    return TOKEN_BYTES
