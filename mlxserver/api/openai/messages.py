"""The messages of a chat: checked, and normalised to what a prompt is made from.

Rule 1: a message comes out as {"role", "content"} plus what its role may carry; content is a string, or None
        for an assistant message that only calls tools or only reasons.
Rule 2: text parts are joined to one string. Reasoning comes out as "reasoning_content", whichever name it had.
Rule 3: an error names the place, as in "messages[0].content[1].type".
"""

from __future__ import annotations

from typing import Any

from mlxserver.api.schema.parameters import ValidationFailed, abbreviate, invalid

MAY_CARRY = {
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
MAYBE_STRING = {"type": ["string", "null"]}
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


def _said_by(*roles: str, required: tuple[str, ...] = ("content",), **fields: Any) -> dict[str, Any]:
    properties = {"role": {"enum": list(roles)}, "content": TEXT, "name": MAYBE_STRING, **fields}
    return {"type": "object", "properties": properties, "required": ["role", *required]}


SHAPE: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _said_by("system", "developer", "user"),
            _said_by("tool", required=("content", "tool_call_id"), tool_call_id={"type": "string"}),
            _said_by(
                "assistant",
                required=(),
                content={"anyOf": [*TEXT["anyOf"], {"type": "null"}]},
                refusal=MAYBE_STRING,
                reasoning=MAYBE_STRING,
                reasoning_content=MAYBE_STRING,
                tool_calls={"type": ["array", "null"], "items": CALL},
            ),
        ]
    },
}


def check_messages(value: Any, param: str) -> list[dict[str, Any]]:
    """Normalised messages. Raises ValidationFailed."""
    if not isinstance(value, list) or not value:
        raise invalid(param, value, "a non-empty list of messages")
    return [_message(message, f"{param}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(param, value, 'an object with "role" and "content"')
    role = value.get("role")
    if not isinstance(role, str) or role not in MAY_CARRY:
        raise invalid(f"{param}.role", role, "one of " + ", ".join(map(repr, MAY_CARRY)))
    carried = _carried(value, role, param)
    return {"role": role, "content": _content(value.get("content"), role, carried, f"{param}.content"), **carried}


def _carried(message: dict[str, Any], role: str, param: str) -> dict[str, Any]:
    """All but role and content. Clients send whole answers back, so null and [] are the same as nothing."""
    given = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None and v != []}
    for name, value in given.items():
        place = f"{param}.{name[:64]}"
        if name not in MAY_CARRY[role]:
            raise ValidationFailed(f"Unknown field {abbreviate(name)} in a message of role '{role}'.", place)
        if name == "tool_calls":
            _check_tool_calls(value, place)
        elif not isinstance(value, str):
            raise invalid(place, value, "a string")
    if role == "tool" and "tool_call_id" not in given:
        raise ValidationFailed("A tool message needs the id of the call that it answers.", f"{param}.tool_call_id")
    return _one_reasoning(given, param)


def _one_reasoning(carried: dict[str, Any], param: str) -> dict[str, Any]:
    if "reasoning" not in carried:
        return carried
    reasoning = carried.pop("reasoning")
    if carried.setdefault("reasoning_content", reasoning) != reasoning:
        message = "'reasoning' and 'reasoning_content' are two names of one thing, but differ. Send one of them."
        raise ValidationFailed(message, f"{param}.reasoning")
    return carried


def _content(value: Any, role: str, carried: dict[str, Any], param: str) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text(part, f"{param}[{index}]") for index, part in enumerate(value))
    if value is None and role == "assistant" and carried.keys() & {"tool_calls", "reasoning_content", "refusal"}:
        return carried.get("refusal")
    raise invalid(param, value, "a string or a list of text parts")


def _text(part: Any, param: str) -> str:
    if not isinstance(part, dict):
        raise invalid(param, part, '{"type": "text", "text": ...}')
    if part.get("type") != "text":
        raise invalid(f"{param}.type", part.get("type"), "'text': images, audio and files are not supported")
    if not isinstance(part.get("text"), str):
        raise invalid(f"{param}.text", part.get("text"), "a string")
    return str(part["text"])


def _check_tool_calls(value: Any, param: str) -> None:
    if not isinstance(value, list):
        raise invalid(param, value, "a list of tool calls")
    for index, call in enumerate(value):
        place = f"{param}[{index}]"
        if not isinstance(call, dict) or call.get("type", "function") != "function":
            raise invalid(place, call, 'an object of type "function"')
        if not isinstance(call.get("id"), str):
            raise invalid(f"{place}.id", call.get("id"), "a string")
        function = call.get("function")
        if not isinstance(function, dict):
            raise invalid(f"{place}.function", function, 'an object with "name" and "arguments"')
        for name in ("name", "arguments"):
            if not isinstance(function.get(name), str):
                raise invalid(f"{place}.function.{name}", function.get(name), "a string")
