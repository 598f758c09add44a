"""Messages of Ollama's chat -> a typed conversation.

They are read as the messages of a chat completion are, with the same tolerance of histories; what has another name is
renamed before. A call has its arguments as an object and need not have an id; a result names its function.
"""

from __future__ import annotations

from typing import Any

from mlxserver.api.openai import messages as openai
from mlxserver.api.schema.parameters import ValidationFailed, invalid
from mlxserver.engine.conversation import Message

NAMES = {"thinking": "reasoning", "tool_name": "name"}  # of fields here and there
NO_IMAGES = "Images are not supported: models read text here."
TEXT: dict[str, Any] = {"type": ["string", "null"]}
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
            "images": {"type": ["array", "null"], "maxItems": 0},
        },
        "required": ["role"],
    },
}
# A user's message is closed, as in a chat completion; an answer or a result has fields of its server.
_MESSAGE: dict[str, Any] = SHAPE["items"]
_OF_USERS = {"properties": {**_MESSAGE["properties"], "role": {"const": "user"}}, "additionalProperties": False}
SHAPE = {**SHAPE, "items": {"anyOf": [{**_MESSAGE, **_OF_USERS}, _MESSAGE]}}


def check_images(value: Any, param: str) -> None:
    """Refuse images; an empty list is none. Raises ValidationFailed."""
    if value:
        raise ValidationFailed(f"'{param}' can't be taken. {NO_IMAGES}", param)


def check_messages(value: Any, param: str) -> tuple[Message, ...]:
    """The conversation, which may be empty. Raises ValidationFailed."""
    if value == []:
        return ()
    if not isinstance(value, list):
        raise invalid(param, value, "a list of messages")
    return openai.check_messages([_renamed(each, f"{param}[{index}]") for index, each in enumerate(value)], param)


def _renamed(message: Any, param: str) -> Any:
    """A message with the names of a chat completion's."""
    if not isinstance(message, dict):
        return message
    check_images(message.get("images"), f"{param}.images")
    for name in NAMES:
        if not isinstance(message.get(name), str | None):
            raise invalid(f"{param}.{name}", message[name], "a string")
    fields = {NAMES.get(name, name): value for name, value in message.items() if name != "images"}
    return {"content": None, **fields}
