"""Tools on the wire, flat or in namespaces, and the choice among them.

Rule 1: a custom tool is a function with one text argument; a tool of a namespace has the namespace in its name. The
        calls of both are given back in the form that the client declared.
Rule 2: tools that only OpenAI runs are left out; those of unknown types, and grammars that are described alone, are
        noted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxserver.api.openai import tools as chat_tools
from mlxserver.api.openai.responses.custom_grammar import pattern_of
from mlxserver.api.openai.responses.items import CUSTOM_ARGUMENT, HOSTED, flat_name
from mlxserver.api.schema.json_schema import check_shape
from mlxserver.api.schema.parameters import ValidationFailed, abbreviate, invalid
from mlxserver.engine.conversation import Tool
from mlxserver.engine.requests import ToolChoice

GRAMMAR = "format"  # the field of a custom tool that has its grammar
OPTIONAL_STRING = {"type": ["string", "null"]}
FUNCTION: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": chat_tools.NAME,
        "description": OPTIONAL_STRING,
        "parameters": {"type": ["object", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["name"],
}
CUSTOM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": chat_tools.NAME,
        "description": OPTIONAL_STRING,
        "format": {
            "type": ["object", "null"],
            "properties": {
                "type": {"enum": ["text", "grammar"]},
                "definition": OPTIONAL_STRING,
                "syntax": OPTIONAL_STRING,
            },
        },
    },
    "required": ["name"],
}
NAMESPACE: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tools": {"type": "array", "items": {"type": "object"}}},
    "required": ["name", "tools"],
}
TOOLS: dict[str, Any] = {"type": "array", "items": {"type": "object"}}
ALLOWED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mode": {"enum": ["auto", "required"]},
        "tools": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["mode", "tools"],
}
CHOICE: dict[str, Any] = {"anyOf": [{"enum": chat_tools.MODES}, {"type": "object"}]}


@dataclass(frozen=True, slots=True)
class CallForm:
    """How the calls of a function are given back: under which name, and as calls of a function or a custom tool."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


@dataclass(frozen=True, slots=True)
class ToolSet:
    """The tools of a request. wire: as they were sent. forms: of calls, by function. unknown: places of the others,
    without those that only OpenAI runs, and of grammars that are described alone.
    """

    wire: Sequence[Mapping[str, Any]] = ()
    tools: tuple[Tool, ...] = ()
    forms: Mapping[str, CallForm] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def form(self, function: str) -> CallForm:
        """How a call of a function is given back; one that was not offered, as it is."""
        return self.forms.get(function) or CallForm(function)


@dataclass(frozen=True, slots=True)
class Choice:
    """The choice among the tools. wire: as it is given back. allowed: names of the only functions, None for all."""

    wire: str | Mapping[str, Any] = "auto"
    mode: str = "auto"
    name: str | None = None
    allowed: frozenset[str] | None = None

    def among(self, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
        """The tools that are offered."""
        return tools if self.allowed is None else tuple(tool for tool in tools if tool.name in self.allowed)

    def resolved(self, *, parallel: bool) -> ToolChoice:
        """The choice as the engine takes it."""
        return ToolChoice(self.mode, self.name, parallel)  # type: ignore[arg-type]

    def check_against(self, tools: tuple[Tool, ...]) -> None:
        """Refuse to force what is not there. Raises ValidationFailed."""
        names = [tool.name for tool in self.among(tools)]
        if self.mode == "function" and self.name not in names:
            raise invalid("tool_choice", self.name, f"the name of one of 'tools': {', '.join(names) or 'none'}")
        if self.mode == "required" and not names:
            raise ValidationFailed("'tool_choice' needs a call, but there are no 'tools' to call.", "tool_choice")


def check_tools(value: Any, param: str) -> ToolSet:
    """The tools, each function with a name of its own. Raises ValidationFailed."""
    check_shape(value, TOOLS, param)
    tools: dict[str, Tool] = {}
    forms: dict[str, CallForm] = {}
    unknown = []
    for tool, form in _read(value, param, None):
        if form is None:
            unknown.append(tool.origin)
        elif tool.name in tools:
            raise invalid(f"{tool.origin}.name", tool.name, "a name that no other tool has")
        else:
            tools[tool.name], forms[tool.name] = tool, form
            if tool.schema_field == GRAMMAR and tool.held is None:
                unknown.append(tool.schema_origin)
    if len(tools) > chat_tools.MAX_TOOLS:
        raise ValidationFailed(f"'{param}' has {len(tools)} functions. Expected at most {chat_tools.MAX_TOOLS}.", param)
    return ToolSet(value, tuple(tools.values()), forms, tuple(unknown))


def check_tool_choice(value: Any, param: str) -> Choice:
    """The choice: a mode, one tool, or the only tools that are allowed. Raises ValidationFailed."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "allowed_tools":
        check_shape(value, ALLOWED, param)
        return Choice(value, value["mode"], allowed=frozenset(_names(value["tools"])))
    if kind in ("function", "custom") and isinstance(value.get("name"), str):
        return Choice({"type": kind, "name": value["name"]}, "function", next(_names([value])))
    modes = {*chat_tools.MODES, *chat_tools.MODE_WORDS, "function", "tool", "custom"}
    if isinstance(kind, str) and kind not in modes:
        raise ValidationFailed(f"'{param}' is a tool that is not run here: {abbreviate(kind)}.", f"{param}.type")
    mode, name = chat_tools.check_tool_choice(value, param)
    return Choice({"type": "function", "name": name} if name else mode, mode, name)


def _names(tools: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The functions of the tools that a choice names; those that are not run here have none."""
    named = (tool for tool in tools if isinstance(tool.get("name"), str))
    return (flat_name(tool["name"], tool.get("namespace")) for tool in named)


def _read(tools: list[dict[str, Any]], param: str, namespace: str | None) -> Iterator[tuple[Tool, CallForm | None]]:
    """Each function, with the form of its calls; None for a tool that is left out."""
    for index, tool in enumerate(tools):
        origin, kind = f"{param}[{index}]", tool.get("type", "function")
        if kind == "namespace" and namespace is None:
            check_shape(tool, NAMESPACE, origin)
            yield from _read(tool["tools"], f"{origin}.tools", tool["name"])
        elif kind in ("function", "custom"):
            function = _function(tool, origin) if kind == "function" else _custom(tool, origin)
            form = CallForm(function.name, namespace, is_custom=kind == "custom")
            yield replace(function, name=flat_name(function.name, namespace)), form
        elif not isinstance(kind, str):
            raise invalid(f"{origin}.type", kind, "a string")
        elif not kind.startswith(HOSTED):
            yield Tool("", origin=origin), None


def _function(tool: dict[str, Any], origin: str) -> Tool:
    check_shape(tool, FUNCTION, origin)
    return Tool(tool["name"], tool.get("description"), tool.get("parameters"), tool.get("strict"), origin)


def _custom(tool: dict[str, Any], origin: str) -> Tool:
    """A function with one argument, the tool's text, which is held to the pattern of its grammar."""
    check_shape(tool, CUSTOM, origin)
    described, form = [tool.get("description") or ""], tool.get("format") or {}
    held = None
    if grammar := form.get("definition"):
        described.append(f"The {CUSTOM_ARGUMENT} follows this grammar:\n{grammar}")
        pattern = pattern_of(form.get("syntax"), grammar)
        held = pattern and _of_text({"type": "string", "pattern": pattern})
    parameters = _of_text({"type": "string", "description": "The whole text that the tool takes."})
    description = "\n\n".join(filter(None, described)) or None
    place = GRAMMAR if grammar else "parameters"
    return Tool(tool["name"], description, parameters, origin=origin, schema_field=place, held=held or None)


def _of_text(argument: dict[str, str]) -> dict[str, Any]:
    """The parameters of a function that takes one text."""
    return {
        "type": "object",
        "properties": {CUSTOM_ARGUMENT: argument},
        "required": [CUSTOM_ARGUMENT],
        "additionalProperties": False,
    }
