"""Messages of a chat on the wire -> a typed conversation.

Rule 1: text parts are joined to one text. Reasoning has two names. A refusal stands for the content that is missing.
Rule 2: null and an empty list are the same as nothing: clients send whole answers back.
Rule 3: an error names the place, as in "messages[0].content[1].type".
"""

from __future__ import annotations

import json
from typing import Any

from mlxserver.api.schema.parameters import ValidationFailed, abbreviate, invalid
from mlxserver.engine.conversation import Message, Part, Reasoning, Text, ToolCall, ToolResult

FIELDS = {
    "system": {"name"},
    "developer": {"name"},
    "user": {"name"},
    "assistant": {"name", "refusal", "reasoning", "reasoning_content", "tool_calls"},
    "tool": {"name", "tool_call_id"},
}

TEXT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
OPTIONAL_STRING = {"type": ["string", "null"]}
CALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "function"],
}


def _message_shape(*roles: str, required: tuple[str, ...] = ("content",), **fields: Any) -> dict[str, Any]:
    properties = {"role": {"enum": list(roles)}, "content": TEXT, "name": OPTIONAL_STRING, **fields}
    return {
        "type": "object",
        "properties": properties,
        "required": ["role", *required],
        "additionalProperties": "user" not in roles,  # a person's message is closed; an answer has fields of its server
    }


SHAPE: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _message_shape("system", "developer", "user"),
            _message_shape("tool", required=("content", "tool_call_id"), tool_call_id={"type": "string"}),
            _message_shape(
                "assistant",
                required=(),
                content={"anyOf": [*TEXT["anyOf"], {"type": "null"}]},
                refusal=OPTIONAL_STRING,
                reasoning=OPTIONAL_STRING,
                reasoning_content=OPTIONAL_STRING,
                tool_calls={"type": ["array", "null"], "items": CALL},
            ),
        ]
    },
}


def check_messages(value: Any, param: str) -> tuple[Message, ...]:
    """The conversation. Raises ValidationFailed."""
    if not isinstance(value, list) or not value:
        raise invalid(param, value, "a non-empty list of messages")
    return tuple([_message(message, f"{param}[{index}]") for index, message in enumerate(value)])


def _message(value: Any, origin: str) -> Message:
    if not isinstance(value, dict):
        raise invalid(origin, value, 'an object with "role" and "content"')
    role = value.get("role")
    if not isinstance(role, str) or role not in FIELDS:
        raise invalid(f"{origin}.role", role, "one of " + ", ".join(map(repr, FIELDS)))
    fields = _fields(value, role, origin)
    content = _content(value.get("content"), role, fields, origin)
    name = fields.get("name")
    parts: tuple[Part, ...] = (Text(content),) if content else ()
    if role == "tool":
        return Message("tool", (ToolResult(fields["tool_call_id"], content, name),), origin)
    if role == "assistant":
        reasoning = fields.get("reasoning_content")
        parts = (*((Reasoning(reasoning),) if reasoning else ()), *parts, *fields.get("tool_calls", ()))
    return Message(role, parts, origin, name)  # type: ignore[arg-type]


def _fields(message: dict[str, Any], role: str, origin: str) -> dict[str, Any]:
    """All but role and content, read."""
    given = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None and v != []}
    for name, value in given.items():
        place = f"{origin}.{name[:64]}"
        if name not in FIELDS[role]:
            raise ValidationFailed(f"Unknown field {abbreviate(name)} in a message of role '{role}'.", place)
        if name == "tool_calls":
            given[name] = _tool_calls(value, place)
        elif not isinstance(value, str):
            raise invalid(place, value, "a string")
    if role == "tool" and "tool_call_id" not in given:
        raise ValidationFailed("A tool message needs the id of the call that it answers.", f"{origin}.tool_call_id")
    if "reasoning" in given and given.setdefault("reasoning_content", given["reasoning"]) != given["reasoning"]:
        conflict = "'reasoning' and 'reasoning_content' are two names of one thing, but differ. Send one of them."
        raise ValidationFailed(conflict, f"{origin}.reasoning")
    return given


def _content(value: Any, role: str, fields: dict[str, Any], origin: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join([_text(part, f"{origin}.content[{index}]") for index, part in enumerate(value)])
    if value is None and role == "assistant" and fields.keys() & {"tool_calls", "reasoning_content", "refusal"}:
        return str(fields.get("refusal", ""))
    raise invalid(f"{origin}.content", value, "a string or a list of text parts")


def _text(part: Any, param: str) -> str:
    if not isinstance(part, dict):
        raise invalid(param, part, '{"type": "text", "text": ...}')
    if part.get("type") != "text":
        raise invalid(f"{param}.type", part.get("type"), "'text': images, audio and files are not supported")
    if not isinstance(part.get("text"), str):
        raise invalid(f"{param}.text", part.get("text"), "a string")
    return str(part["text"])


def _tool_calls(value: Any, param: str) -> list[ToolCall]:
    if not isinstance(value, list):
        raise invalid(param, value, "a list of tool calls")
    return [_tool_call(call, f"{param}[{index}]") for index, call in enumerate(value)]


def _tool_call(call: Any, param: str) -> ToolCall:
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        raise invalid(param, call, 'an object of type "function"')
    if not isinstance(call.get("id"), str):
        raise invalid(f"{param}.id", call.get("id"), "a string")
    function = call.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{param}.function", function, 'an object with "name" and "arguments"')
    for name in ("name", "arguments"):
        if not isinstance(function.get(name), str):
            raise invalid(f"{param}.function.{name}", function.get(name), "a string")
    return ToolCall(call["id"], function["name"], _arguments(function["arguments"], f"{param}.function.arguments"))


def _arguments(text: str, param: str) -> dict[str, Any]:
    """The object that a text stands for; an empty text stands for an empty one."""
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise invalid(param, text, f"an object in JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise invalid(param, text, "an object in JSON")
    return arguments
