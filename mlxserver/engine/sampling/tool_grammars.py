"""Grammars of tool calls: of calls that are required, of strict calls within free text, and of calls beside a schema.

Rule 1: required calls are a JSON array and nothing else, whatever the model's own format is; but where calls are
        messages, they are those (channel_grammars.py).
Rule 2: under tool_choice "auto" the text is free, and the body of a call is constrained if any tool is strict.
Rule 3: where the answer has a schema, the model either calls, without a word before it, or keeps the schema.
Rule 4: the body of a call is JSON where the model writes JSON. In any other format it is free up to the end tag; strict
        tools are held to their schema where parameters stand between tags (tagged_grammars.py) or arguments are JSON
        behind a name (named_json_grammars.py); text between tags is not held to what is not shown (Tool.held).
        Elsewhere strict has no effect: programs send it with every tool.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mlxserver.engine.conversation import Tool
from mlxserver.engine.output.json_calls import ARGUMENTS
from mlxserver.engine.output.named_json_calls import JsonCalls, NamedJsonCalls
from mlxserver.engine.output.tool_formats import ToolFormat
from mlxserver.engine.requests import Grammar, ToolChoice
from mlxserver.engine.sampling.json_grammars import answer_document, document_text, grammar_of
from mlxserver.engine.sampling.named_json_grammars import named_json_rules
from mlxserver.engine.sampling.schema_document import SchemaDocument
from mlxserver.engine.sampling.schema_faults import refusing, schema_text
from mlxserver.engine.sampling.schema_normalizer import Normalizer
from mlxserver.engine.sampling.tagged_grammars import TaggedCalls, tag_syntax
from mlxserver.engine.sampling.vocabulary import Vocabulary, in_lark

log = logging.getLogger(__name__)

HEADER = """\
%llguidance {}
TEXT: /(.|\\n)*/
MORE: /(.|\\n)+/
GAP: /[ \\n]{1,3}/
BREAK: /\\n/
"""


def callable_tools(tools: Sequence[Tool], choice: ToolChoice) -> list[Tool]:
    """The tools that a choice which forces calls leaves to the model."""
    return [tool for tool in tools if choice.mode == "required" or tool.name == choice.name]


def strict_tool(tools: Sequence[Tool]) -> Tool | None:
    """The first strict tool, if any."""
    return next((tool for tool in tools if tool.is_strict), None)


def forced_calls(tools: Sequence[Tool], choice: ToolChoice, *, thinks: bool = False) -> Grammar:
    """Grammar of required calls: a JSON array of names with arguments. thinks: reasoning may come before it.

    Raises PromptRejected.
    """
    callable = callable_tools(tools, choice)
    calls = CallSchemas(callable, is_strict=True)
    # At most one call per tool: a small model would never stop calling.
    most = len(callable) if choice.parallel else 1
    text = calls.text({"type": "array", "items": {"anyOf": calls.forms}, "minItems": 1, "maxItems": most})
    return grammar_of(text, "tools", calls.documents, thinks=thinks)


def strict_calls(tools: Sequence[Tool], tool_format: ToolFormat, vocabulary: Vocabulary) -> Grammar | None:
    """Grammar of free text with calls of these tools; None if no tool is strict, or can be held to its schema.

    Raises PromptRejected.
    """
    strict = strict_tool(tools)
    if not strict:
        return None
    is_tagged = tag_syntax(tool_format.reader) is not None
    if not _is_enforced(tool_format) or (is_tagged and not any(tool.strict for tool in tools)):
        log.debug("strict has no effect on calls in the format %r", tool_format.name)
        return None
    body, documents = _body(tools, tool_format, vocabulary)
    start = vocabulary.split(tool_format.start)
    # TEXT up to a start tag is lazy: it ends there, and the call begins.
    is_lazy = "[lazy]" if isinstance(start[0], str) else ""
    lark = f"""{HEADER}\
start: call* TEXT
call: beginning {in_lark(start[1:])} body
beginning{is_lazy}: TEXT {in_lark(start[:1])}
{body}
"""
    return Grammar(lark, strict.strict_origin, is_lark=True, documents=documents)


def calls_or_answer(
    tools: Sequence[Tool],
    choice: ToolChoice,
    tool_format: ToolFormat,
    vocabulary: Vocabulary,
    *,
    schema: Mapping[str, Any] | None,
    param: str,
    thinks: bool,
) -> Grammar:
    """Grammar of calls, or else of an answer with a schema, any object for None.

    param: the field of the schema. thinks: reasoning may come before it. Raises PromptRejected.
    """
    answer = answer_document(schema, param)
    body, documents = _body(tools, tool_format, vocabulary)
    # The rules of a strict call begin behind the first start tag.
    tags = tool_format.starts[:1] if strict_tool(tools) else tool_format.starts
    texts = " | ".join(in_lark(vocabulary.split(tag)) for tag in tags)
    start = f"({texts}){'' if tool_format.start else '?'}" if texts else ""
    lark = f"""{HEADER}\
start: {"GAP? " if thinks else ""}(answer | call{" (GAP? call)*" if choice.parallel else ""})
answer: %json {document_text(answer)}
call: {start} body
{body}
"""
    return Grammar(lark, param, is_lark=True, documents=(answer, *documents))


def _body(
    tools: Sequence[Tool], tool_format: ToolFormat, vocabulary: Vocabulary
) -> tuple[str, tuple[SchemaDocument, ...]]:
    """Rules of what comes behind the start tag of calls, the end tag included, and the schemas in them."""
    end = vocabulary.split(tool_format.end) if tool_format.end else []
    if tool_format.is_json:
        calls = CallSchemas(tools)
        return f"body: GAP? calls GAP? {in_lark(end)}\n{calls.rule}", calls.documents
    if not tool_format.start:
        calls = CallSchemas(tools, ARGUMENTS)
        return f"body: calls\n{calls.rule}", calls.documents
    if not any(tool.is_strict for tool in tools):
        return _free_body(end, vocabulary), ()
    return _strict_body(tools, tool_format, vocabulary, end)


def _strict_body(
    tools: Sequence[Tool], tool_format: ToolFormat, vocabulary: Vocabulary, end: Sequence[int | str]
) -> tuple[str, tuple[SchemaDocument, ...]]:
    """The same of tools of which some are strict, in a format that is not JSON as a whole."""
    if isinstance(reader := tool_format.reader, NamedJsonCalls):
        calls = CallSchemas(tools)
        names = [tool.name for tool in tools]
        rules = named_json_rules(
            reader, tool_format.start, names, lambda index: calls.text(calls.arguments[index]), vocabulary
        )
        return rules, calls.documents
    if isinstance(reader, JsonCalls):
        calls = CallSchemas(tools)
        rule = calls.keyed_rule if reader.is_keyed else calls.listed_rule
        return f"body: GAP? calls GAP? {in_lark(end)}\n{rule}", calls.documents
    syntax = tag_syntax(reader)
    if syntax is None:
        return _free_body(end, vocabulary), ()
    tagged = TaggedCalls(tools, syntax, vocabulary)
    if syntax.call_end == tool_format.end:
        return f"body: GAP? function\n{tagged.rules}", tagged.documents
    return f"body: GAP? function (GAP? function)* GAP? {in_lark(end)}\n{tagged.rules}", tagged.documents


def _is_enforced(tool_format: ToolFormat) -> bool:
    """Whether strict tools can be held to their schemas where words may come, too."""
    reader = tool_format.reader
    return bool(tool_format.start) and (
        isinstance(reader, JsonCalls | NamedJsonCalls) or tag_syntax(reader) is not None
    )


def _free_body(end: Sequence[int | str], vocabulary: Vocabulary) -> str:
    """Rules of anything up to an end tag, or without one to the end of the answer."""
    control = [token for token in vocabulary.control_tokens() if token not in end[:1]]
    pieces = f"(TEXT <[{','.join(map(str, control))}]>)* " if control else ""
    if not end:
        return f"body: {pieces}MORE"
    if isinstance(end[0], int):
        return f"body: {pieces}TEXT {in_lark(end)}"
    return f"body: {pieces}ending {in_lark(end[1:])}\nending[lazy]: TEXT {in_lark(end[:1])}"


class CallSchemas:
    """Schemas of calls in JSON. keys: under which the arguments may stand.

    is_strict: the arguments of all tools follow their parameters, not those of strict tools alone.
    """

    def __init__(self, tools: Sequence[Tool], keys: Sequence[str] = ARGUMENTS[:1], *, is_strict: bool = False) -> None:
        self._normalizer = Normalizer()
        self.documents: tuple[SchemaDocument, ...] = ()
        self.arguments = [
            self._arguments(tool) if is_strict or tool.is_strict else {"type": "object"} for tool in tools
        ]
        self.forms = [
            _call(tool.name, key, arguments)
            for tool, arguments in zip(tools, self.arguments, strict=True)
            for key in keys
        ]

    @property
    def rule(self) -> str:
        """The rule `calls`, one of these."""
        return f"calls: %json {self.text({'anyOf': self.forms})}"

    @property
    def listed_rule(self) -> str:
        """The rule `calls`: a list of these or one of them, under the keys and with the ids that models write."""
        text = {"type": "string"}
        names = [form["properties"]["name"] for form in self.forms]
        written = [
            {**form, "properties": {**before, key: name, argument: arguments, **behind}, "required": [key, argument]}
            for form, name, arguments in zip(self.forms, names, self.arguments, strict=True)
            for before, key, argument, behind in (
                ({}, "name", ARGUMENTS[0], {"id": text}),
                ({}, "name", ARGUMENTS[1], {"id": text}),
                ({"tool_call_id": text}, "tool_name", ARGUMENTS[1], {}),
            )
        ]
        return self._lists(written)

    @property
    def keyed_rule(self) -> str:
        """The rule `calls`: a list of these or one of them, each name the key of its arguments."""
        names = [form["properties"]["name"]["const"] for form in self.forms]
        keyed = [
            {"type": "object", "properties": {name: arguments}, "required": [name], "additionalProperties": False}
            for name, arguments in zip(names, self.arguments, strict=True)
        ]
        return self._lists(keyed)

    def _lists(self, forms: Sequence[Mapping[str, Any]]) -> str:
        calls = {"type": "array", "items": {"anyOf": forms}, "minItems": 1}
        return f"calls: %json {self.text({'anyOf': [calls, *forms]})}"

    def text(self, form: Mapping[str, Any]) -> str:
        """Text of a schema that is made of these."""
        return schema_text(form, self._normalizer.definitions)

    def _arguments(self, tool: Tool) -> dict[str, Any]:
        document = SchemaDocument(tool.schema, f"The parameters of {tool.name!r}", tool.schema_origin)
        self.documents += (document,)
        with refusing(document):
            form = self._normalizer.add(document)
        return form if form.get("type") == "object" else {"allOf": [{"type": "object"}, form]}


def _call(name: str, key: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: arguments},
        "required": ["name", key],
        "additionalProperties": False,
    }
