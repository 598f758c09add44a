"""Messages of Ollama's chat -> a typed conversation.

They are read as the messages of a chat completion are, with the same tolerance of histories; what has another name is
renamed before. A call has its arguments as an object and need not have an id; a result names its function. Images stand
beside the text, and are shown before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxserver.api.images import of_base64, of_url
from mlxserver.api.openai import messages as openai
from mlxserver.api.schema.parameters import ValidationFailed, invalid
from mlxserver.engine.conversation import Image, Message

NAMES = {"thinking": "reasoning", "tool_name": "name"}  # of fields here and there
TEXT: dict[str, Any] = {"type": ["string", "null"]}
IMAGES: dict[str, Any] = {"type": "array", "items": {"type": "string", "description": "base64 of an image's bytes"}}
CALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "object"}},
            "required": ["name"],
        },
    },
    "required": ["function"],
}
SHAPE: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "user", "assistant", "tool"]},
            "content": TEXT,
            "thinking": TEXT,
            "tool_calls": {"type": ["array", "null"], "items": CALL},
            "tool_name": TEXT,
            "tool_call_id": TEXT,
            "images": {**IMAGES, "type": ["array", "null"]},
        },
        "required": ["role"],
    },
}
# A user's message is closed, as in a chat completion; an answer or a result has fields of its server.
_MESSAGE: dict[str, Any] = SHAPE["items"]
_OF_USERS = {"properties": {**_MESSAGE["properties"], "role": {"const": "user"}}, "additionalProperties": False}
SHAPE = {**SHAPE, "items": {"anyOf": [{**_MESSAGE, **_OF_USERS}, _MESSAGE]}}


def check_images(value: Any, param: str) -> tuple[Image, ...]:
    """The images of a list of base64 texts. Raises ValidationFailed."""
    if not isinstance(value, list | None):
        raise invalid(param, value, "a list of images in base64")
    return tuple([_image(each, f"{param}[{index}]") for index, each in enumerate(value or [])])


def _image(value: Any, param: str) -> Image:
    """An image in base64, or in a data URL, which some programs send."""
    return (of_url if isinstance(value, str) and value[:5].lower() == "data:" else of_base64)(value, param)


def check_messages(value: Any, param: str) -> tuple[Message, ...]:
    """The conversation, which may be empty. Raises ValidationFailed."""
    if value == []:
        return ()
    if not isinstance(value, list):
        raise invalid(param, value, "a list of messages")
    messages = openai.check_messages([_renamed(each, f"{param}[{index}]") for index, each in enumerate(value)], param)
    return tuple([_with_images(message, given.get("images")) for message, given in zip(messages, value, strict=True)])


def _with_images(message: Message, given: Any) -> Message:
    place = f"{message.origin}.images"
    images = check_images(given, place)
    if not images:
        return message
    if message.result:
        return replace(message, parts=(replace(message.result, images=images),))
    if message.role != "user":
        raise ValidationFailed(f"'{place}' has images, which only messages of users and tools may have.", place)
    return replace(message, parts=(*images, *message.parts))


def _renamed(message: Any, param: str) -> Any:
    """A message with the names of a chat completion's."""
    if not isinstance(message, dict):
        return message
    for name in NAMES:
        if not isinstance(message.get(name), str | None):
            raise invalid(f"{param}.{name}", message[name], "a string")
    fields = {NAMES.get(name, name): value for name, value in message.items() if name != "images"}
    return {"content": None, **fields}
