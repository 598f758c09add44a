"""Grammars of tool calls: of calls that are required, of strict calls within free text, and of calls beside a schema.

Rule 1: required calls are a JSON array and nothing else, whatever the model's own format is.
Rule 2: under tool_choice "auto" the text is free, and the body of a call is constrained if any tool is strict.
Rule 3: where the answer has a schema, the model either calls, without a word before it, or keeps the schema.
Rule 4: the body of a call is JSON where the model writes JSON. In any other format it is free up to the end tag; strict
        tools are held to their schema where parameters stand between tags (tagged_grammars.py) or arguments are JSON
        behind a name (named_json_grammars.py), else refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxserver.engine.conversation import Tool
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.json_calls import ARGUMENTS
from mlxserver.engine.output.named_json_calls import NamedJsonCalls
from mlxserver.engine.output.tool_formats import ToolFormat
from mlxserver.engine.requests import Grammar, ToolChoice
from mlxserver.engine.sampling.json_grammars import answer_document, document_text, grammar_of
from mlxserver.engine.sampling.named_json_grammars import named_json_rules
from mlxserver.engine.sampling.schema_document import SchemaDocument
from mlxserver.engine.sampling.schema_faults import refusing, schema_text
from mlxserver.engine.sampling.schema_normalizer import Normalizer
from mlxserver.engine.sampling.tagged_grammars import TaggedCalls, tag_syntax
from mlxserver.engine.sampling.vocabulary import Vocabulary, in_lark

HEADER = """\
%llguidance {}
TEXT: /(.|\\n)*/
MORE: /(.|\\n)+/
GAP: /[ \\n]{1,2}/
BREAK: /\\n/
"""


def forced_calls(tools: Sequence[Tool], choice: ToolChoice, *, thinks: bool = False) -> Grammar:
    """Grammar of required calls: a JSON array of names with arguments. thinks: reasoning may come before it.

    Raises PromptRejected.
    """
    callable = [tool for tool in tools if choice.mode == "required" or tool.name == choice.name]
    calls = _Calls(callable, is_strict=True)
    # At most one call per tool: a small model would never stop calling.
    most = len(callable) if choice.parallel else 1
    text = calls.text({"type": "array", "items": {"anyOf": calls.forms}, "minItems": 1, "maxItems": most})
    return grammar_of(text, "tools", calls.documents, thinks=thinks)


def strict_calls(tools: Sequence[Tool], tool_format: ToolFormat, vocabulary: Vocabulary) -> Grammar | None:
    """Grammar of free text with calls of these tools; None if no tool is strict. Raises PromptRejected."""
    strict = [tool for tool in tools if tool.strict]
    if not strict:
        return None
    if not tool_format.start:
        raise _strict_rejected(strict[0])
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
    return Grammar(lark, f"{strict[0].origin}.strict", is_lark=True, documents=documents)


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
    start = in_lark(vocabulary.split(tool_format.start)) if tool_format.start else ""
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
    strict = [tool for tool in tools if tool.strict]
    end = vocabulary.split(tool_format.end) if tool_format.end else []
    if tool_format.is_json:
        calls = _Calls(tools)
        return f"body: GAP? calls GAP? {in_lark(end)}\n{calls.rule}", calls.documents
    if not tool_format.start:
        calls = _Calls(tools, ARGUMENTS)
        return f"body: calls\n{calls.rule}", calls.documents
    if not strict:
        return _free_body(end, vocabulary), ()
    if isinstance(reader := tool_format.reader, NamedJsonCalls):
        calls = _Calls(tools)
        names = [tool.name for tool in tools]
        rules = named_json_rules(
            reader, tool_format.start, names, lambda index: calls.text(calls.arguments[index]), vocabulary
        )
        if rules:
            return rules, calls.documents
    syntax = tag_syntax(reader)
    if syntax is None:
        raise _strict_rejected(strict[0])
    tagged = TaggedCalls(tools, syntax, vocabulary)
    if syntax.call_end == tool_format.end:
        return f"body: GAP? function\n{tagged.rules}", tagged.documents
    return f"body: GAP? function (GAP? function)* GAP? {in_lark(end)}\n{tagged.rules}", tagged.documents


def _strict_rejected(tool: Tool) -> PromptRejected:
    return PromptRejected(
        "This model writes its calls in a format of its own, in which a schema can't be enforced while it may also "
        'answer in words. Leave strict out, or set tool_choice to "required".',
        f"{tool.origin}.strict",
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


class _Calls:
    """Schemas of calls in JSON. keys: under which the arguments may stand.

    is_strict: the arguments of all tools follow their parameters, not those of strict tools alone.
    """

    def __init__(self, tools: Sequence[Tool], keys: Sequence[str] = ARGUMENTS[:1], *, is_strict: bool = False) -> None:
        self._normalizer = Normalizer()
        self.documents: tuple[SchemaDocument, ...] = ()
        self.arguments = [self._arguments(tool) if is_strict or tool.strict else {"type": "object"} for tool in tools]
        self.forms = [
            _call(tool.name, key, arguments)
            for tool, arguments in zip(tools, self.arguments, strict=True)
            for key in keys
        ]

    @property
    def rule(self) -> str:
        """The rule `calls`, one of these."""
        return f"calls: %json {self.text({'anyOf': self.forms})}"

    def text(self, form: Mapping[str, Any]) -> str:
        """Text of a schema that is made of these."""
        return schema_text(form, self._normalizer.definitions)

    def _arguments(self, tool: Tool) -> dict[str, Any]:
        document = SchemaDocument(
            tool.parameters or {}, f"The parameters of {tool.name!r}", f"{tool.origin}.parameters"
        )
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
