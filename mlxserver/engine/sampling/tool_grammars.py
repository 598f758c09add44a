"""What binds a model to the schemas of its tools: for calls that must come, and for those that may.

Rule 1: a call that must come is a JSON array and nothing else, whatever the model's own format is.
Rule 2: under tool_choice "auto" the text is free, and what stands between the tags of a call is bound, if any tool is
        strict. That can be done where the model writes JSON there; with any other format strict is refused.
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

# As templates write their examples: models follow what they have seen.
SPACED = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

# TEXT that goes on to a start tag is lazy: it ends there, and the call begins.
LARK = """\
%llguidance {{}}
start: call* TEXT
call: beginning "\\n"? calls "\\n"? {end}
{beginning}
calls: %json {schema}
TEXT: /(.|\\n)*/
"""


def forced_calls(tools: Sequence[Tool], choice: ToolChoice) -> Grammar:
    """Calls that must come: a list of names with arguments. Raises PromptRejected."""
    callable = [tool for tool in tools if choice.mode == "required" or tool.name == choice.name]
    calls = [_call(tool, f"/items/anyOf/{place}") for place, tool in enumerate(callable)]
    # As many calls as there are tools at the most: a small model would never stop calling.
    most = len(calls) if choice.parallel else 1
    return json_grammar({"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most}, "tools")


def strict_calls(tools: Sequence[Tool], tool_format: ToolFormat, is_special: Callable[[str], bool]) -> Grammar | None:
    """Free text with calls of these tools; None if no tool is strict.

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
    calls = [_call(tool, f"/anyOf/{place}", binds=place in strict) for place, tool in enumerate(tools)]
    start, end = tool_format.start, tool_format.end
    beginning = f"TEXT {start}" if is_special(start) else f"TEXT {json.dumps(start)}"
    is_lazy = "" if is_special(start) else "[lazy]"
    lark = LARK.format(
        beginning=f"beginning{is_lazy}: {beginning}",
        end=end if is_special(end) else json.dumps(end),
        schema=json_grammar({"x-guidance": SPACED, "anyOf": calls}, param).text,
    )
    return Grammar(lark, param, is_lark=True)


def _call(tool: Tool, place: str, *, binds: bool = True) -> dict[str, Any]:
    """The schema of a call, for this place in a document. binds: its arguments are held to the function's own."""
    try:
        parameters = _moved(tool.parameters if binds else None, f"{place}/properties/arguments")
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


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references into itself hold where it is a part of a document, at this place."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part, place) for key, part in schema.items()}
    if isinstance(target := schema.get("$ref"), str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = f"#{place}{target[1:]}"
    return moved
