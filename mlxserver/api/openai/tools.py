"""Tools on the wire, {"type": "function", "function": {"name", "description"?, "parameters"?, "strict"?}}, and the
choice among them.
"""

from __future__ import annotations

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
        "properties": {"type": {"const": "function"}, "function": function},
        "required": ["type", "function"],
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
CHOICE: dict[str, Any] = {"anyOf": [{"enum": MODES}, _function()]}


def check_tools(value: Any, param: str) -> tuple[Tool, ...]:
    """The tools, each with a name of its own. Raises ValidationFailed."""
    check_shape(value, TOOLS, param)
    tools = tuple(Tool(**tool["function"], origin=f"{param}[{index}].function") for index, tool in enumerate(value))
    names: set[str] = set()
    for tool in tools:
        if tool.name in names:
            raise invalid(f"{tool.origin}.name", tool.name, "a name that no other tool has")
        names.add(tool.name)
    return tools


def check_tool_choice(value: Any, param: str) -> tuple[str, str | None]:
    """The mode ("none", "auto", "required" or "function"), and the name of the one function."""
    if isinstance(value, str) and value in MODES:
        return value, None
    if not isinstance(value, dict):
        modes = ", ".join(map(repr, MODES))
        raise invalid(param, value, f'{modes} or {{"type": "function", "function": {{"name": ...}}}}')
    check_shape(value, _function(), param)
    return "function", value["function"]["name"]
