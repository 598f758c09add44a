"""Messages of a chat on the wire -> a typed conversation.

Rule 1: neighbouring parts of text are joined to one text. Reasoning has two names, and may be a part. A refusal is
        text.
Rule 2: null and an empty list are the same as nothing: clients send whole answers back.
Rule 3: the history is not judged: fields of an answer or a result that are not ours are left out, ids may be missing,
        and arguments that are no JSON object are kept as text.
Rule 4: an error names the place, as in "messages[0].content[1].type".
"""

from __future__ import annotations

import json
from typing import Any

from mlxserver.api.images import DETAILS, URL_SHAPE, check_detail, join_texts, of_url, refuse_file
from mlxserver.api.schema.parameters import ValidationFailed, abbreviate, invalid
from mlxserver.engine.conversation import Image, Message, Part, Reasoning, Text, ToolCall, ToolResult

FIELDS = {
    "system": {"name"},
    "developer": {"name"},
    "user": {"name"},
    "assistant": {"name", "refusal", "reasoning", "reasoning_content", "tool_calls"},
    "tool": {"name", "tool_call_id"},
}
WRITTEN_BY_OTHERS = {"assistant", "tool"}  # their messages come from servers and programs, not from a person
HARMLESS = {"cache_control"}

TEXT_PARTS = ("text", "input_text", "output_text")
ANSWER_PARTS = {"refusal": "refusal", "thinking": "thinking", "reasoning": "text"}
IMAGE_PARTS = ("image_url", "input_image")
SEEING_ROLES = ("user", "tool")  # whose messages may have images


def _part_shape(kind: str, field: str) -> dict[str, Any]:
    properties = {"type": {"const": kind}, field: {"type": "string"}}
    return {"type": "object", "properties": properties, "required": ["type", field]}


def _content_shape(*parts: dict[str, Any]) -> dict[str, Any]:
    texts = [_part_shape(kind, "text") for kind in TEXT_PARTS]
    items = {"anyOf": [*texts, *parts]}
    return {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": items}]}


DETAIL: dict[str, Any] = {"enum": list(DETAILS), "description": "low: a small picture; otherwise as it was sent"}
IMAGE_URL: dict[str, Any] = {"type": "object", "properties": {"url": URL_SHAPE, "detail": DETAIL}, "required": ["url"]}
IMAGES: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "type": {"enum": list(IMAGE_PARTS)},
            "image_url": {"anyOf": [URL_SHAPE, IMAGE_URL]},
            "detail": DETAIL,
        },
        "required": ["type", "image_url"],
    }
]
CONTENT = _content_shape()
SEEN_CONTENT = _content_shape(*IMAGES)
ANSWER_CONTENT = _content_shape(*[_part_shape(kind, field) for kind, field in ANSWER_PARTS.items()])
OPTIONAL_STRING = {"type": ["string", "null"]}
CALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": OPTIONAL_STRING,
        "type": {"enum": ["function", None]},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "arguments": {"description": "JSON text of an object; what is none is given to the model as it is"},
            },
            "required": ["name"],
        },
    },
    "required": ["function"],
}


def _message_shape(
    *roles: str, required: tuple[str, ...] = (), is_closed: bool = False, **fields: Any
) -> dict[str, Any]:
    properties = {"role": {"enum": list(roles)}, "content": CONTENT, "name": OPTIONAL_STRING, **fields}
    return {
        "type": "object",
        "properties": properties,
        "required": ["role", *required],
        "additionalProperties": not is_closed,
    }


# A person's message is closed; an answer has fields of its server.
_WRITTEN: dict[str, Any] = {"required": ("content",), "is_closed": True, **{name: {} for name in HARMLESS}}
SHAPE: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _message_shape("system", "developer", **_WRITTEN),
            _message_shape("user", content=SEEN_CONTENT, **_WRITTEN),
            _message_shape("tool", content=SEEN_CONTENT, tool_call_id=OPTIONAL_STRING),
            _message_shape(
                "assistant",
                content=ANSWER_CONTENT,
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
    if "content" not in value and role not in WRITTEN_BY_OTHERS:
        raise invalid(f"{origin}.content", None, "a string or a list of parts")
    fields = _fields(value, role, origin)
    parts = read_content(value.get("content"), role, f"{origin}.content")
    name = fields.get("name")
    if role == "tool":
        return Message("tool", (read_result(fields.get("tool_call_id", ""), parts, name),), origin)
    if role == "assistant":
        return Message("assistant", _answer(parts, fields), origin, name)
    return Message(role, parts, origin, name)  # type: ignore[arg-type]


def read_result(call_id: str, parts: tuple[Text | Image | Reasoning, ...], name: str | None = None) -> ToolResult:
    """The result of a call, whose content has these parts."""
    text = "".join([part.text for part in parts if isinstance(part, Text)])
    return ToolResult(call_id, text, name, tuple([part for part in parts if isinstance(part, Image)]))


def _answer(content: tuple[Text | Image | Reasoning, ...], fields: dict[str, Any]) -> tuple[Part, ...]:
    """The parts of an answer: its reasoning by either name, once, its content or else its refusal, its calls."""
    thoughts = dict.fromkeys([fields[name] for name in ("reasoning_content", "reasoning") if name in fields])
    thoughts.pop("".join([part.text for part in content if isinstance(part, Reasoning)]), None)
    refusal = () if content or "refusal" not in fields else (Text(fields["refusal"]),)
    return (*map(Reasoning, filter(None, thoughts)), *content, *refusal, *fields.get("tool_calls", ()))


def _fields(message: dict[str, Any], role: str, origin: str) -> dict[str, Any]:
    """All but role and content, read."""
    given = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None and v != []}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        place = f"{origin}.{name[:64]}"
        if name not in FIELDS[role]:
            if role in WRITTEN_BY_OTHERS or name in HARMLESS:
                continue
            raise ValidationFailed(f"Unknown field {abbreviate(name)} in a message of role '{role}'.", place)
        if name == "tool_calls":
            fields[name] = _tool_calls(value, place)
        elif isinstance(value, str):
            fields[name] = value
        else:
            raise invalid(place, value, "a string")
    return fields


def read_content(value: Any, role: str, param: str) -> tuple[Text | Image | Reasoning, ...]:
    """The texts and images in order, and the reasoning of an answer's parts before them."""
    if value is None or isinstance(value, str):
        return (Text(value),) if value else ()
    if not isinstance(value, list):
        raise invalid(param, value, "a string or a list of parts")
    parts = [_part(part, role, f"{param}[{index}]") for index, part in enumerate(value)]
    reasoning = [part for part in parts if isinstance(part, Reasoning) and part.text]
    return (*reasoning, *join_texts(part for part in parts if not isinstance(part, Reasoning)))


def _part(part: Any, role: str, param: str) -> Text | Image | Reasoning:
    if not isinstance(part, dict):
        raise invalid(param, part, '{"type": "text", "text": ...}')
    kind = part.get("type")
    if kind in IMAGE_PARTS:
        return _image(part, role, param)
    field = "text" if kind in TEXT_PARTS else ANSWER_PARTS.get(str(kind)) if role == "assistant" else None
    if field is None:
        raise invalid(f"{param}.type", kind, "'text' or 'image_url': audio and files are not supported")
    text = part.get(field)
    if not isinstance(text, str):
        raise invalid(f"{param}.{field}", text, "a string")
    return Reasoning(text) if kind in ("thinking", "reasoning") else Text(text)


def _image(part: dict[str, Any], role: str, param: str) -> Image:
    """The image of a part of a chat completion or a response, which have its detail at two places."""
    if role not in SEEING_ROLES:
        raise ValidationFailed(f"'{param}' is an image, which only messages of users and tools may have.", param)
    refuse_file(part, param, "'image_url' with a data URL")
    place, given = f"{param}.image_url", part.get("image_url")
    if isinstance(given, dict):
        detail = check_detail(given.get("detail"), f"{place}.detail")
        return of_url(given.get("url"), f"{place}.url", detail=detail, origin=place)
    return of_url(given, place, detail=check_detail(part.get("detail"), f"{param}.detail"))


def _tool_calls(value: Any, param: str) -> list[ToolCall]:
    if not isinstance(value, list):
        raise invalid(param, value, "a list of tool calls")
    return [_tool_call(call, f"{param}[{index}]") for index, call in enumerate(value)]


def _tool_call(call: Any, param: str) -> ToolCall:
    if not isinstance(call, dict) or call.get("type") not in ("function", None):
        raise invalid(param, call, 'an object of type "function"')
    call_id = call.get("id")
    if not isinstance(call_id, str | None):
        raise invalid(f"{param}.id", call_id, "a string")
    function = call.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{param}.function", function, 'an object with "name" and "arguments"')
    if not isinstance(function.get("name"), str):
        raise invalid(f"{param}.function.name", function.get("name"), "a string")
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else "" if arguments is None else json.dumps(arguments)
    return ToolCall.of_text(call_id or "", function["name"], text)
