"""Grammars of tool calls: of calls that are required, of strict calls within free text, and of calls beside a schema.

Rule 1: required calls are a JSON array and nothing else, whatever the model's own format is.
Rule 2: under tool_choice "auto" the text is free, and the body of a call is constrained if any tool is strict.
Rule 3: where the answer has a schema, the model either calls, without a word before it, or keeps the schema.
Rule 4: the body of a call is JSON where the model writes JSON. In any other format it is free up to the end tag, and
        strict tools are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mlxserver.engine.conversation import Tool
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.tool_formats import ToolFormat
from mlxserver.engine.requests import ToolChoice
from mlxserver.engine.sampling.grammars import Grammar
from mlxserver.engine.sampling.json_grammars import answer_document, document_text, grammar_of
from mlxserver.engine.sampling.schema_document import SchemaDocument
from mlxserver.engine.sampling.schema_faults import refusing, schema_text
from mlxserver.engine.sampling.schema_normalizer import Normalizer

HEADER = """\
%llguidance {}
TEXT: /(.|\\n)*/
GAP: /[ \\n]{1,2}/
"""


class Vocabulary(Protocol):
    """What a grammar of text needs to know of the tokens."""

    def split(self, text: str) -> list[int | str]:
        """The control tokens in a text, which no string of a grammar matches, and what is between them."""

    def control_tokens(self) -> list[int]:
        """All control tokens but those that end a sequence."""


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
    _check_strict(strict, tool_format)
    calls = _Calls(tools)
    start, end = (_tag(vocabulary.split(tag)) for tag in (tool_format.start, tool_format.end))
    # TEXT up to a start tag is lazy: it ends there, and the call begins.
    is_lazy = "[lazy]" if start.startswith('"') else ""
    lark = f"""{HEADER}\
start: call* TEXT
call: beginning GAP? calls GAP? {end}
beginning{is_lazy}: TEXT {start}
calls: %json {calls.text({"anyOf": calls.forms})}
"""
    return Grammar(lark, f"{strict[0].origin}.strict", is_lark=True, documents=calls.documents)


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
    _check_strict([tool for tool in tools if tool.strict], tool_format)
    answer = answer_document(schema, param)
    body, documents = _call(tools, tool_format, vocabulary)
    lark = f"""{HEADER}\
start: {"GAP? " if thinks else ""}(answer | call{" (GAP? call)*" if choice.parallel else ""})
answer: %json {document_text(answer)}
{body}
"""
    return Grammar(lark, param, is_lark=True, documents=(answer, *documents))


def _check_strict(strict: Sequence[Tool], tool_format: ToolFormat) -> None:
    if strict and not tool_format.is_json:
        raise PromptRejected(
            "This model writes its calls in a format of its own, in which a schema can't be enforced while it may also "
            'answer in words. Leave strict out, or set tool_choice to "required".',
            f"{strict[0].origin}.strict",
        )


def _call(
    tools: Sequence[Tool], tool_format: ToolFormat, vocabulary: Vocabulary
) -> tuple[str, tuple[SchemaDocument, ...]]:
    """Rules of one call in a model's format."""
    start, end = (vocabulary.split(tag) if tag else [] for tag in (tool_format.start, tool_format.end))
    if tool_format.is_json:
        calls = _Calls(tools)
        lark = f"call: {_tag(start)} GAP? calls GAP? {_tag(end)}\ncalls: %json {calls.text({'anyOf': calls.forms})}"
        return lark, calls.documents
    return f"call: {_tag(start)} {_free_body(end, vocabulary)}", ()


def _free_body(end: Sequence[int | str], vocabulary: Vocabulary) -> str:
    """The rest of a rule: anything up to an end tag, or without one to the end of the answer."""
    control = [token for token in vocabulary.control_tokens() if token not in end[:1]]
    pieces = f"(TEXT <[{','.join(map(str, control))}]>)* " if control else ""
    if not end or isinstance(end[0], int):
        return f"{pieces}TEXT {_tag(end)}"
    return f"{pieces}ending {_tag(end[1:])}\nending[lazy]: TEXT {_tag(end[:1])}"


def _tag(pieces: Sequence[int | str]) -> str:
    """A tag in Lark."""
    return " ".join(
        f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece, ensure_ascii=False) for piece in pieces
    )


class _Calls:
    """Schemas of calls in JSON, one per tool. is_strict: the arguments of all follow the parameters, not of some."""

    def __init__(self, tools: Sequence[Tool], *, is_strict: bool = False) -> None:
        self._normalizer = Normalizer()
        self.documents: tuple[SchemaDocument, ...] = ()
        self.forms = [self._form(tool, is_strict=is_strict or bool(tool.strict)) for tool in tools]

    def text(self, form: Mapping[str, Any]) -> str:
        """Text of a schema that is made of these."""
        return schema_text(form, self._normalizer.definitions)

    def _form(self, tool: Tool, *, is_strict: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {"type": "object"}
        if is_strict and tool.parameters:
            document = SchemaDocument(tool.parameters, f"The parameters of {tool.name!r}", f"{tool.origin}.parameters")
            self.documents += (document,)
            with refusing(document):
                form = self._normalizer.add(document)
                arguments = form if form.get("type") == "object" else {"allOf": [arguments, form]}
        return {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
