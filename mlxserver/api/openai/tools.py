"""Tools on the wire, {"type": "function", "function": {"name", "description"?, "parameters"?, "strict"?}}, and the
choice among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxserver.api.schema.json_schema import check_shape
from mlxserver.api.schema.parameters import invalid
from mlxserver.engine.conversation import Tool

MODES = ["none", "auto", "required"]
MAX_TOOLS = 256
NAME = {
    "type": "string",
    "pattern": "^[A-Za-z0-9_.-]{1,128}$",
    "description": "1 to 128 letters, digits or any of _ . -",
}


def _function(**fields: Any) -> dict[str, Any]:
    """The shape of {"type": "function", "function": {"name", ...}}."""
    function = {
        "type": "object",
        "properties": {"name": NAME, **fields},
        "required": ["name"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"type": {"type": ["string", "null"], "enum": ["function", None]}, "function": function},
        "required": ["function"],
        "additionalProperties": False,
    }


TOOLS: dict[str, Any] = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": _function(
        description={"type": ["string", "null"]},
        parameters={"type": ["object", "null"]},
        strict={"type": ["boolean", "null"]},
    ),
}
MODE_WORDS = {"any": "required"}  # of other APIs
BARE_MODE: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"enum": [*MODES, *MODE_WORDS]}},
    "required": ["type"],
    "additionalProperties": False,
}
BARE_NAME: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"enum": ["function", "tool"]}, "name": NAME},
    "required": ["type", "name"],
    "additionalProperties": False,
}
CHOICE: dict[str, Any] = {"anyOf": [{"enum": MODES}, _function(), BARE_MODE, BARE_NAME]}


def check_tools(value: Any, param: str) -> tuple[Tool, ...]:
    """The tools, each with a name of its own. Raises ValidationFailed."""
    check_shape(value, TOOLS, param)
    return with_own_names(
        [Tool(**tool["function"], origin=f"{param}[{index}].function") for index, tool in enumerate(value)]
    )


def with_own_names(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """The tools, if each has a name of its own. Raises ValidationFailed."""
    names: set[str] = set()
    for tool in tools:
        if tool.name in names:
            raise invalid(f"{tool.origin}.name", tool.name, "a name that no other tool has")
        names.add(tool.name)
    return tuple(tools)


def check_tool_choice(value: Any, param: str) -> tuple[str, str | None]:
    """The mode ("none", "auto", "required" or "function"), and the name of the one function.

    Also in the forms of the responses and messages APIs: {"type": MODE} and {"type": "tool", "name": ...}.
    """
    if isinstance(value, str) and value in MODES:
        return value, None
    if not isinstance(value, dict):
        modes = ", ".join(map(repr, MODES))
        raise invalid(param, value, f'{modes} or {{"type": "function", "function": {{"name": ...}}}}')
    if "function" not in value and (shape := _bare_shape(value)):
        check_shape(value, shape, param)
        mode: str = value["type"]
        return ("function", value["name"]) if "name" in value else (MODE_WORDS.get(mode, mode), None)
    check_shape(value, _function(), param)
    return "function", value["function"]["name"]


def _bare_shape(choice: dict[str, Any]) -> dict[str, Any] | None:
    """The shape of a choice without "function"; None for one that should have it."""
    if "name" in choice:
        return BARE_NAME
    return BARE_MODE if choice.get("type") in BARE_MODE["properties"]["type"]["enum"] else None
