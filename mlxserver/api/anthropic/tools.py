"""Tools on the wire, {"name", "description"?, "input_schema", "strict"?}, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxserver.api.openai.tools import MAX_TOOLS, NAME, with_own_names
from mlxserver.api.schema.json_schema import check_shape
from mlxserver.engine.conversation import Tool
from mlxserver.engine.requests import ToolChoice

CUSTOM = ("custom", None)  # the types of tools that the client runs, and describes by a schema
TOOLS: dict[str, Any] = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {"type": "object", "properties": {"type": {"type": ["string", "null"]}, "name": {"type": "string"}}},
}
TOOL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": NAME,
        "description": {"type": ["string", "null"]},
        "input_schema": {"type": ["object", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["name"],
}
MODES = {"auto": "auto", "any": "required", "tool": "function", "none": "none"}
CHOICE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"enum": [*MODES]},
        "name": NAME,
        "disable_parallel_tool_use": {"type": ["boolean", "null"]},
    },
    "required": ["type"],
}


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request. left_out: the places of those that only Anthropic's servers or models know."""

    offered: tuple[Tool, ...] = ()
    left_out: tuple[str, ...] = ()


def check_tools(value: Any, param: str) -> Tools:
    """The tools, each with a name of its own. Raises ValidationFailed."""
    check_shape(value, TOOLS, param)
    places = [(tool, f"{param}[{index}]") for index, tool in enumerate(value)]
    custom = [(tool, place) for tool, place in places if tool.get("type") in CUSTOM]
    return Tools(
        with_own_names([_tool(tool, place) for tool, place in custom]),
        tuple(place for tool, place in places if tool.get("type") not in CUSTOM),
    )


def _tool(tool: dict[str, Any], place: str) -> Tool:
    check_shape(tool, TOOL, place)
    fields = (tool["name"], tool.get("description"), tool.get("input_schema"), tool.get("strict"))
    return Tool(*fields, origin=place, schema_field="input_schema")


def check_tool_choice(value: Any, param: str) -> ToolChoice:
    """The choice. Raises ValidationFailed."""
    shape = CHOICE if not isinstance(value, dict) or value.get("type") != "tool" else NAMED_CHOICE
    check_shape(value, shape, param)
    is_parallel = not value.get("disable_parallel_tool_use")
    name = value["name"] if value["type"] == "tool" else None
    return ToolChoice(MODES[value["type"]], name, is_parallel)  # type: ignore[arg-type]


NAMED_CHOICE = {**CHOICE, "required": ["type", "name"]}
