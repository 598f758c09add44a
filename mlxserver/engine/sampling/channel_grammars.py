"""Grammars of whole answers in OpenAI's harmony format: reasoning, calls and the answer are messages with headers.

Rule 1: a grammar begins with the header of the first message, of which the prompt may have written a part.
Rule 2: reasoning is free, and comes first. What is held to a schema are the body of a call and that of the answer.
Rule 3: all calls go to functions of the request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlxserver.engine.conversation import Tool
from mlxserver.engine.output.channels import NAMESPACE
from mlxserver.engine.output.reasoning_formats import HARMONY
from mlxserver.engine.requests import Grammar, ToolChoice
from mlxserver.engine.sampling.json_grammars import answer_document, document_text
from mlxserver.engine.sampling.schema_document import SchemaDocument
from mlxserver.engine.sampling.tool_grammars import CallSchemas, callable_tools, strict_tool
from mlxserver.engine.sampling.vocabulary import Vocabulary, in_lark

OPENING = f"{HARMONY.start}assistant"
CHANNEL, BODY = HARMONY.new_header, HARMONY.message
CONSTRAIN = "<|constrain|>"  # before the type of a body, which models write or leave out


def forced_messages(tools: Sequence[Tool], choice: ToolChoice, vocabulary: Vocabulary) -> Grammar:
    """Grammar of required calls behind the reasoning. Raises PromptRejected."""
    callable = callable_tools(tools, choice)
    calls = CallSchemas(callable, is_strict=True)
    most = len(callable) if choice.parallel else 1
    more = f"(stop opening call){{0,{most - 1}}}" if most > 1 else ""
    return _grammar(f"(note opening)* call {more}", vocabulary, "tools", callable, calls)


def strict_messages(tools: Sequence[Tool], vocabulary: Vocabulary) -> Grammar | None:
    """Grammar of free messages and calls of these tools; None if no tool is strict. Raises PromptRejected."""
    strict = strict_tool(tools)
    if not strict:
        return None
    form = (
        "((free until | call stop) opening)* (free until | free TEXT | call stop?)\nfree: analysis | preamble | final"
    )
    return _grammar(form, vocabulary, strict.strict_origin, tools, CallSchemas(tools))


def answer_messages(
    tools: Sequence[Tool],
    choice: ToolChoice,
    vocabulary: Vocabulary,
    *,
    schema: Mapping[str, Any] | None,
    param: str,
) -> Grammar:
    """Grammar of an answer with a schema, any object for None, or of calls in its place. Raises PromptRejected."""
    answer = answer_document(schema, param)
    calls = f" | call{' (stop opening call)*' if choice.parallel else ''}" if tools else ""
    form = f"(note opening)* (final GAP? answer GAP?{calls})\nanswer: %json {document_text(answer)}"
    return _grammar(form, vocabulary, param, tools, CallSchemas(tools), (answer,))


def _grammar(
    form: str,
    vocabulary: Vocabulary,
    param: str,
    tools: Sequence[Tool],
    calls: CallSchemas,
    documents: tuple[SchemaDocument, ...] = (),
) -> Grammar:
    """Grammar of messages in the given order. The token behind the last of them is an end of sequence."""

    def marks(text: str) -> str:
        return in_lark(vocabulary.split(text))

    end = vocabulary.split(HARMONY.ends[0])
    kind = f'" "? {marks(CONSTRAIN)}? (/ ?json/ | / ?code/)?'
    rules = [
        "%llguidance {}",
        "TEXT: /(.|\\n)*/",
        "GAP: /[ \\n]{1,2}/",
        f"start: opening? {form}",
        f"opening: {marks(OPENING)}",
        f"stop: {in_lark(end)}",
        f"until{'' if isinstance(end[0], int) else '[lazy]'}: TEXT {in_lark(end)}",
        "note: analysis until",
        f"kind: {kind}",
        f"analysis: {marks(f'{CHANNEL}analysis{BODY}')}",
        f"preamble: {marks(f'{CHANNEL}commentary{BODY}')}",
        f"final: {marks(f'{CHANNEL}final')} kind {marks(BODY)}",
        *(_call_rules(tools, calls, marks) if tools else ()),
    ]
    return Grammar("\n".join(rules), param, is_lark=True, documents=(*documents, *calls.documents))


def _call_rules(tools: Sequence[Tool], calls: CallSchemas, marks: Callable[[str], str]) -> Iterator[str]:
    """Rules of a call of one of the tools. The recipient stands before the channel, or behind it."""
    yield "call: " + " | ".join(f"call{index}" for index in range(len(tools)))
    for index, tool in enumerate(tools):
        before = marks(f" to={NAMESPACE}{tool.name}{CHANNEL}commentary")
        behind = marks(f"{CHANNEL}commentary to={NAMESPACE}{tool.name}")
        yield f"call{index}: ({before} | {behind}) kind {marks(BODY)} GAP? call{index}j GAP?"
        yield f"call{index}j: %json {calls.text(calls.arguments[index])}"
