"""Grammars of tool calls: of calls that are required, and of strict calls within free text.

Rule 1: required calls are a JSON array and nothing else, whatever the model's own format is.
Rule 2: under tool_choice "auto" the text is free, and the body of a call is constrained if any tool is strict. That
        takes a model that writes its calls as JSON; with any other format strict is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from mlxserver.engine.conversation import Tool
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.tool_formats import ToolFormat
from mlxserver.engine.requests import ToolChoice
from mlxserver.engine.sampling.grammars import Grammar, json_grammar

# Separators as in the examples of chat templates, which models follow.
SPACED = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

# TEXT up to a start tag is lazy: it ends there, and the call begins.
LARK = """\
%llguidance {{}}
start: call* TEXT
call: beginning "\\n"? calls "\\n"? {end}
{beginning}
calls: %json {schema}
TEXT: /(.|\\n)*/
"""


def forced_calls(tools: Sequence[Tool], choice: ToolChoice) -> Grammar:
    """Grammar of required calls: a JSON array of names with arguments. Raises PromptRejected."""
    callable = [tool for tool in tools if choice.mode == "required" or tool.name == choice.name]
    calls = [_call(tool, f"/items/anyOf/{index}") for index, tool in enumerate(callable)]
    # At most one call per tool: a small model would never stop calling.
    most = len(calls) if choice.parallel else 1
    return json_grammar({"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most}, "tools")


def strict_calls(tools: Sequence[Tool], tool_format: ToolFormat, is_special: Callable[[str], bool]) -> Grammar | None:
    """Grammar of free text with calls of these tools; None if no tool is strict.

    is_special: whether a tag is a control token. Raises PromptRejected.
    """
    strict = [index for index, tool in enumerate(tools) if tool.strict]
    if not strict:
        return None
    param = f"{tools[strict[0]].origin}.strict"
    if not tool_format.is_json:
        raise PromptRejected(
            "This model writes its calls in a format of its own, in which a schema can't be enforced while it may also "
            'answer in words. Leave strict out, or set tool_choice to "required".',
            param,
        )
    calls = [_call(tool, f"/anyOf/{index}", is_strict=index in strict) for index, tool in enumerate(tools)]
    start, end = tool_format.start, tool_format.end
    beginning = f"TEXT {start}" if is_special(start) else f"TEXT {json.dumps(start)}"
    is_lazy = "" if is_special(start) else "[lazy]"
    lark = LARK.format(
        beginning=f"beginning{is_lazy}: {beginning}",
        end=end if is_special(end) else json.dumps(end),
        schema=json_grammar({"x-guidance": SPACED, "anyOf": calls}, param).text,
    )
    return Grammar(lark, param, is_lark=True)


def _call(tool: Tool, path: str, *, is_strict: bool = True) -> dict[str, Any]:
    """Schema of a call, at this path of a document. is_strict: its arguments follow the function's parameters."""
    try:
        parameters = _moved(tool.parameters if is_strict else None, f"{path}/properties/arguments")
    except RecursionError:
        raise PromptRejected(
            f"The parameters of {tool.name!r} are nested too deeply.", f"{tool.origin}.parameters"
        ) from None
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": parameters or {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, path: str) -> Any:
    """A schema with its references to itself made valid for this path of a document."""
    if isinstance(schema, list):
        return [_moved(part, path) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part, path) for key, part in schema.items()}
    if isinstance(target := schema.get("$ref"), str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = f"#{path}{target[1:]}"
    return moved
