"""System text and messages on the wire -> a typed conversation.

Rule 1: messages stay in order, a system message in the middle too. The results in a user's message become messages of
        their own, before its text and its images.
Rule 2: neighbouring texts that a client wrote as blocks are set apart by a blank line; those of an answer were one
        text.
Rule 3: the history is not judged: of an answer, blocks that this server does not write are left out, and so is hidden
        reasoning.
Rule 4: an error names the place, as in "messages[0].content[1].type".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlxserver.api.images import URL_SHAPE, join_texts, of_base64, of_url, refuse_file
from mlxserver.api.schema.parameters import ValidationFailed, invalid
from mlxserver.engine.conversation import Image, Message, Part, Reasoning, Text, ToolCall, ToolResult

Block = dict[str, Any]

# What programs put into their prompts anew for each session or turn: behind it, no prefix would ever be found again.
VOLATILE = re.compile(r"^(?:x-anthropic-billing-header:.*|<total_tokens>.*</total_tokens>)(?:\n|\Z)", re.MULTILINE)
ERROR_WORD = "error"
BLANK_LINE = "\n\n"

TEXT_BLOCK: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
SYSTEM: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_BLOCK}]}
BASE64_SOURCE: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "base64"}, "media_type": {"type": "string"}, "data": {"type": "string"}},
    "required": ["type", "data"],
}
URL_SOURCE: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "url"}, "url": URL_SHAPE},
    "required": ["type", "url"],
}
IMAGE_BLOCK: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "image"}, "source": {"anyOf": [BASE64_SOURCE, URL_SOURCE]}},
    "required": ["type", "source"],
}
BLOCK: dict[str, Any] = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
MESSAGES: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["user", "assistant", "system"]},
            "content": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [TEXT_BLOCK, IMAGE_BLOCK, BLOCK]}}]
            },
        },
        "required": ["role", "content"],
    },
}
ROLES = ("user", "assistant", "system")


def check_system(value: Any, param: str) -> tuple[Message, ...]:
    """The system message, if it has a text. Raises ValidationFailed."""
    return _system(_blocks(value, param), param)


def check_messages(value: Any, param: str) -> tuple[Message, ...]:
    """The conversation. Raises ValidationFailed."""
    if not isinstance(value, list) or not value:
        raise invalid(param, value, "a non-empty list of messages")
    return tuple(part for index, message in enumerate(value) for part in _messages(message, f"{param}[{index}]"))


def _messages(value: Any, origin: str) -> Sequence[Message]:
    if not isinstance(value, dict):
        raise invalid(origin, value, 'an object with "role" and "content"')
    role = value.get("role")
    if role not in ROLES:
        raise invalid(f"{origin}.role", role, "one of " + ", ".join(map(repr, ROLES)))
    blocks = _blocks(value.get("content"), f"{origin}.content")
    if role == "system":
        return _system(blocks, origin)
    if role == "assistant":
        return [Message("assistant", tuple(part for block, place in blocks for part in _answer(block, place)), origin)]
    return _user(blocks, origin)


def _system(blocks: Sequence[tuple[Block, str]], origin: str) -> tuple[Message, ...]:
    if image := next((place for block, place in blocks if block["type"] == "image"), None):
        raise ValidationFailed(f"'{image}' is an image, which only messages of users and results may have.", image)
    parts = (part for block, place in blocks for part in _parts(block, place))
    texts = tuple(join_texts([_stable(part) for part in parts], BLANK_LINE))
    return (Message("system", texts, origin),) if texts else ()


def _user(blocks: Sequence[tuple[Block, str]], origin: str) -> list[Message]:
    results = [
        Message("tool", (_result(block, place),), place) for block, place in blocks if block["type"] == "tool_result"
    ]
    parts = _shown([block for block in blocks if block[0]["type"] != "tool_result"])
    return results if results and not parts else [*results, Message("user", parts, origin)]


def _shown(blocks: Iterable[tuple[Block, str]]) -> tuple[Text | Image, ...]:
    """What a client's blocks show, without texts that are volatile altogether."""
    parts = (part for block, place in blocks for part in _parts(block, place))
    return tuple(join_texts((part for part in parts if not _is_volatile(part)), BLANK_LINE))


def _is_volatile(part: Text | Image) -> bool:
    return isinstance(part, Text) and VOLATILE.fullmatch(part.text.strip()) is not None


def _stable(part: Text | Image) -> Text | Image:
    return Text(VOLATILE.sub("", part.text)) if isinstance(part, Text) else part


def _blocks(content: Any, param: str) -> list[tuple[Block, str]]:
    """The blocks of a content, each with its place. A text is one block."""
    if isinstance(content, str):
        return [({"type": "text", "text": content}, param)]
    if not isinstance(content, list):
        raise invalid(param, content, "a string or a list of content blocks")
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise invalid(f"{param}[{index}]", block, 'an object with a "type", such as {"type": "text", "text": ...}')
    return [(block, f"{param}[{index}]") for index, block in enumerate(content)]


def _parts(block: Block, place: str) -> Iterator[Text | Image]:
    """What a block shows that a client wrote. Raises ValidationFailed for one that the model can't be shown."""
    match block["type"]:
        case "text":
            yield Text(_string(block, "text", place))
        case "document" | "search_result":
            yield from _document(block, place)
        case "tool_reference":
            yield Text(_string(block, "tool_name", place))
        case "image":
            yield _image(block.get("source"), place)
        case kind:
            raise invalid(f"{place}.type", kind, "'text' or 'image': files are not supported")


def _image(source: Any, origin: str) -> Image:
    place = f"{origin}.source"
    if not isinstance(source, dict):
        raise invalid(place, source, 'an object with the "type" "base64" or "url"')
    match source.get("type"):
        case "base64":
            return of_base64(source.get("data"), f"{place}.data", origin=origin)
        case "url":
            return of_url(source.get("url"), f"{place}.url", origin=origin)
        case kind:
            refuse_file(source, place, "a source of the type 'base64'")
            raise invalid(f"{place}.type", kind, "'base64' or 'url'")


def _document(block: Block, place: str) -> Iterator[Text | Image]:
    """Title and content of a document or of a search result, which has its blocks at another place."""
    if isinstance(title := block.get("title"), str):
        yield Text(title)
    given = {"type": "content", **block} if block["type"] == "search_result" else block.get("source")
    source: Block = given if isinstance(given, dict) else {}
    if source.get("type") == "text":
        yield Text(_string(source, "data", f"{place}.source"))
    elif "content" in source:
        for part, part_place in _blocks(source["content"], f"{place}.content"):
            yield from _parts(part, part_place)
    else:
        raise ValidationFailed(f"'{place}' is a file. This server reads none; send its text.", place)


def _result(block: Block, place: str) -> ToolResult:
    """The result of a call. A failure is told by its text, as chat templates have no other place for it."""
    content = block.get("content")
    parts = () if content is None else _shown(_blocks(content, f"{place}.content"))
    text = BLANK_LINE.join([part.text for part in parts if isinstance(part, Text)])
    if block.get("is_error") is True and ERROR_WORD not in text.lower():
        text = f"Error: {text}" if text else "Error"
    call_id = block.get("tool_use_id")
    images = tuple([part for part in parts if isinstance(part, Image)])
    return ToolResult(call_id if isinstance(call_id, str) else "", text, images=images)


def _answer(block: Block, place: str) -> Iterator[Part]:
    """The part that a block of an answer is; none for hidden reasoning and for what servers' own tools did."""
    match block["type"]:
        case "text":
            if text := _string(block, "text", place):
                yield Text(text)
        case "thinking":
            if thought := _string(block, "thinking", place):
                yield Reasoning(thought)
        case "tool_use":
            call_id, name = block.get("id"), _string(block, "name", place)
            given = block.get("input")
            text = given if isinstance(given, str) else json.dumps({} if given is None else given)
            yield ToolCall.of_text(call_id if isinstance(call_id, str) else "", name, text)


def _string(block: Block, field: str, place: str) -> str:
    value = block.get(field)
    if not isinstance(value, str):
        raise invalid(f"{place}.{field}", value, "a string")
    return value
