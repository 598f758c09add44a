"""Grammars of answers in JSON.

White space is that which models have learnt to write, and bounded: a small model would go on with it for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxserver.engine.requests import Grammar
from mlxserver.engine.sampling.schema_document import SchemaDocument
from mlxserver.engine.sampling.schema_faults import refusing, schema_text
from mlxserver.engine.sampling.schema_normalizer import Normalizer

# The line breaks that a thinking model writes behind its closing tag.
BEHIND_THINKING = """\
%llguidance {{}}
start: GAP? answer
GAP: /\\n{{1,2}}/
answer: %json {schema}
"""


def json_grammar(schema: Mapping[str, Any] | None, param: str, *, thinks: bool = False) -> Grammar:
    """Grammar of an answer with this schema, any object for None. thinks: reasoning may come before it.

    Raises PromptRejected.
    """
    document = answer_document(schema, param)
    return grammar_of(document_text(document), param, (document,), thinks=thinks)


def grammar_of(text: str, param: str, documents: tuple[SchemaDocument, ...], *, thinks: bool) -> Grammar:
    """Grammar of JSON with this text of a schema."""
    if not thinks:
        return Grammar(text, param, documents=documents)
    return Grammar(BEHIND_THINKING.format(schema=text), param, is_lark=True, documents=documents)


def answer_document(schema: Mapping[str, Any] | None, param: str) -> SchemaDocument:
    """The schema of an answer, any object for None."""
    return SchemaDocument({"type": "object"} if schema is None else schema, "The JSON schema", param)


def document_text(document: SchemaDocument) -> str:
    """Text of a document's normal form. Raises PromptRejected."""
    normalizer = Normalizer()
    with refusing(document):
        form = normalizer.add(document)
    return schema_text(form, normalizer.definitions)
