"""Items of an input on the wire -> items with the parts of the conversation that they add.

Rule 1: the history is not judged: fields that are not ours are left out, ids may be missing, and arguments that are no
        JSON object are kept as text. Items of other kinds, which only OpenAI's own
        tools make, are left out; those of unknown kinds are noted.
Rule 2: an item is kept in the form in which it is given back, which can be read again.
Rule 3: an error names the place, as in "input[0].content[1].type".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

from mlxserver.api.openai.messages import IMAGE_PARTS, OPTIONAL_STRING, SEEN_CONTENT, read_content, read_result
from mlxserver.api.openai.responses.ids import Prefix, new_id
from mlxserver.api.schema.parameters import invalid
from mlxserver.engine.conversation import Message, Part, Reasoning, Role, Text, ToolCall

CUSTOM_ARGUMENT = "input"  # of the function that a custom tool becomes
ROLES: Mapping[str, Role] = {"user": "user", "system": "system", "developer": "system", "assistant": "assistant"}
BLANK_LINE = Text("\n\n")
# The beginnings of the types of tools that OpenAI runs, or that its own models know, and of their items.
HOSTED = (
    *("web_search", "tool_search", "file_search", "image_generation", "code_interpreter", "computer", "mcp"),
    *("local_shell", "shell", "apply_patch", "programmatic_tool_calling"),
)
NO_TEXT = {"additional_tools", "compaction", "compaction_trigger", "configuration_update", "program", "program_output"}
ITEM_SHAPES: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"type": {"const": "message"}, "role": {"enum": ["user"]}, "content": SEEN_CONTENT},
        "required": ["role", "content"],
    },
    {
        "type": "object",
        "properties": {
            "type": {"enum": ["function_call_output", "custom_tool_call_output"]},
            "call_id": OPTIONAL_STRING,
            "output": SEEN_CONTENT,
        },
        "required": ["type", "output"],
    },
    {"type": "object"},
]
INPUT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": ITEM_SHAPES}}]}


@dataclass(frozen=True, slots=True)
class Item:
    """One item. wire: as it is given back. origin: where the client wrote it. role, parts: what it adds to a prompt."""

    wire: Mapping[str, Any]
    origin: str
    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """An item of an earlier response, by its id."""

    id: str
    origin: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An item of a kind that adds nothing here. is_known: whether it is one of OpenAI's."""

    origin: str
    is_known: bool


InputItem = Item | Reference | LeftOut


def check_input(value: Any, param: str) -> tuple[InputItem, ...]:
    """The items of an input, which is text or a list. Raises ValidationFailed."""
    if isinstance(value, str):
        return (_message({"role": "user", "content": value}, param),)
    if not isinstance(value, list):
        raise invalid(param, value, "a string or a list of items")
    return tuple([_item(item, f"{param}[{index}]") for index, item in enumerate(value)])


def flat_name(name: str, namespace: object) -> str:
    """The name of the function that a tool, of a namespace or of none, becomes."""
    return f"{namespace}__{name}" if isinstance(namespace, str) and namespace else name


def conversation(instructions: str | None, items: Iterable[Item]) -> tuple[Message, ...]:
    """The messages of a conversation: neighbours of one role are one message, but for results."""
    first = [Item({}, "instructions", "system", (Text(instructions),))] if instructions else []
    results = count()
    groups = groupby([*first, *items], lambda item: (item.role, next(results) if item.role == "tool" else None))
    return tuple(
        [Message(role, tuple(_joined(group := list(members))), group[0].origin) for (role, _), members in groups]
    )


def _joined(items: Sequence[Item]) -> Iterator[Part]:
    """The parts of all items, a blank line between their texts."""
    has_text = False
    for item in items:
        adds_text = any(isinstance(part, Text) for part in item.parts)
        if has_text and adds_text:
            yield BLANK_LINE
        yield from item.parts
        has_text = has_text or adds_text


def _item(value: Any, origin: str) -> InputItem:
    if not isinstance(value, dict):
        raise invalid(origin, value, 'an object with a "type", or with "role" and "content"')
    kind = value.get("type")
    if kind is None:
        kind = "item_reference" if "role" not in value and "id" in value else "message"
    if not isinstance(kind, str):
        raise invalid(f"{origin}.type", kind, "a string")
    if kind == "item_reference":
        return Reference(_required(value, "id", origin), origin)
    read = READERS.get(kind)
    return read(value, origin) if read else LeftOut(origin, kind in NO_TEXT or kind.startswith(HOSTED))


def _message(value: dict[str, Any], origin: str) -> Item:
    name, content = value.get("role"), value.get("content")
    if not isinstance(name, str) or name not in ROLES:
        raise invalid(f"{origin}.role", name, "one of " + ", ".join(map(repr, ROLES)))
    parts = read_content(content, ROLES[name], f"{origin}.content")
    pieces = [{"text": content or ""}] if content is None or isinstance(content, str) else content
    make = _answer_part if name == "assistant" else _input_part
    return Item(_wire(value, "msg", role=name, content=[make(piece) for piece in pieces]), origin, ROLES[name], parts)


def _input_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("type") in IMAGE_PARTS:
        given = part["image_url"]
        image = given if isinstance(given, dict) else {"url": given, **part}
        return {"type": "input_image", "image_url": image["url"], "detail": image.get("detail") or "auto"}
    return {"type": "input_text", "text": part["text"]}


def _answer_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if "refusal" in part:
        return {"type": "refusal", "refusal": part["refusal"]}
    text = part["text"] if "text" in part else part["thinking"]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _function_call(value: dict[str, Any], origin: str) -> Item:
    given, call_id = value.get("arguments"), _text(value.get("call_id"))
    arguments = given if isinstance(given, str) else "" if given is None else json.dumps(given)
    wire = _called(value, "fc", origin, arguments=arguments)
    call = ToolCall.of_text(call_id, flat_name(wire["name"], wire.get("namespace")), arguments)
    return Item(wire, origin, "assistant", (call,))


def _custom_call(value: dict[str, Any], origin: str) -> Item:
    text, call_id = _text(value.get("input")), _text(value.get("call_id"))
    wire = _called(value, "ctc", origin, input=text)
    arguments = json.dumps({CUSTOM_ARGUMENT: text}, ensure_ascii=False)
    call = ToolCall.of_text(call_id, flat_name(wire["name"], wire.get("namespace")), arguments)
    return Item(wire, origin, "assistant", (call,))


def _called(value: dict[str, Any], prefix: Prefix, origin: str, **fields: str) -> dict[str, Any]:
    """A call as it is given back."""
    namespace = value.get("namespace")
    named = {"namespace": namespace} if isinstance(namespace, str) else {}
    call_id, name = _text(value.get("call_id")), _required(value, "name", origin)
    return _wire(value, prefix, call_id=call_id, name=name, **named, **fields)


def _result(prefix: Prefix) -> Callable[[dict[str, Any], str], Item]:
    def read(value: dict[str, Any], origin: str) -> Item:
        output, call_id = value.get("output"), _text(value.get("call_id"))
        if not isinstance(output, str | list | None):
            output = json.dumps(output, ensure_ascii=False)
        result = read_result(call_id, read_content(output, "tool", f"{origin}.output"))
        kept = [_input_part(part) for part in output] if isinstance(output, list) and result.images else result.text
        return Item(_wire(value, prefix, call_id=call_id, output=kept), origin, "tool", (result,))

    return read


def _reasoning(value: dict[str, Any], origin: str) -> Item:
    """Reasoning: its own text, or else the summary, which is the same where this server wrote it."""
    contents, summaries = _texts(value.get("content")), _texts(value.get("summary"))
    text = "\n\n".join(contents or summaries)
    wire = _wire(value, "rs", summary=[{"type": "summary_text", "text": part} for part in summaries])
    if contents:
        wire["content"] = [{"type": "reasoning_text", "text": part} for part in contents]
    return Item(wire, origin, "assistant", (Reasoning(text),) if text else ())


READERS: Mapping[str, Callable[[dict[str, Any], str], Item]] = {
    "message": _message,
    "function_call": _function_call,
    "custom_tool_call": _custom_call,
    "function_call_output": _result("fco"),
    "custom_tool_call_output": _result("ctco"),
    "reasoning": _reasoning,
}


def _wire(value: Mapping[str, Any], prefix: Prefix, **fields: Any) -> dict[str, Any]:
    id = _text(value.get("id")) or new_id(prefix)
    return {"id": id, "type": value.get("type") or "message", "status": "completed", **fields}


def _required(value: Mapping[str, Any], field: str, origin: str) -> str:
    text = value.get(field)
    if not isinstance(text, str):
        raise invalid(f"{origin}.{field}", text, "a string")
    return text


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _texts(parts: object) -> list[str]:
    """The texts of a list of parts, without empty ones."""
    found = [_text(part.get("text")) for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return [text for text in found if text]
