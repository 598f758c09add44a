"""Grammar of strict calls whose parameters stand between tags, as text: <parameter=name>value</parameter> and its like.

Rule 1: parameters come in the order of the schema, those that are required always.
Rule 2: a value that may be text is free up to its closing tag, within minLength and maxLength. One of listed values is
        that value. Any other is JSON of its schema.
Rule 3: what a text between tags can't be held to is refused with its path: patterns, formats, and parameters that are
        not simply listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlxserver.engine.conversation import Tool
from mlxserver.engine.output.tagged_calls import KeyedCalls
from mlxserver.engine.output.tagged_calls import TaggedCalls as TagReader
from mlxserver.engine.sampling.schema_document import SchemaDocument, Subschema, Unenforceable
from mlxserver.engine.sampling.schema_faults import refusing, schema_text
from mlxserver.engine.sampling.schema_keywords import FORMATS, REFERENCES
from mlxserver.engine.sampling.schema_normalizer import Normalizer
from mlxserver.engine.sampling.vocabulary import Vocabulary, in_lark

UNIONS = ("anyOf", "oneOf")
COMBINING = frozenset([*UNIONS, "allOf", *REFERENCES, "patternProperties", "not", "if", "dependentRequired"])
MAX_REFERENCES = 16
DSML = "｜DSML｜"  # DeepSeek's prefix of tags


@dataclass(frozen=True, slots=True)
class TagSyntax:
    """Text of a call: its opening tag as a function of the name, what closes it, and the same of a parameter.

    parameter: the tags before a value, between which white space may stand. breaks: a line break stands on both sides
    of a value and is no part of it. states_text: an attribute of a parameter's tag states whether its value is text.
    """

    call: Callable[[str], str]
    call_end: str
    parameter: Callable[[str], tuple[str, ...]]
    parameter_end: str
    breaks: bool = False
    states_text: bool = False


class TaggedCalls:
    """Rules of the calls of some tools in Lark; the rule `function` is one call."""

    def __init__(self, tools: Sequence[Tool], syntax: TagSyntax, vocabulary: Vocabulary) -> None:
        self.documents: tuple[SchemaDocument, ...] = ()
        self._syntax = syntax
        self._vocabulary = vocabulary
        functions = [self._function(index, tool) for index, tool in enumerate(tools)]
        names = " | ".join(f"function{index}" for index in range(len(tools)))
        self.rules = "\n".join([f"function: {names}", *(rule for rules in functions for rule in rules)])

    def _function(self, index: int, tool: Tool) -> list[str]:
        opening, name = self._tag(self._syntax.call(tool.name)), f"function{index}"
        if not tool.strict:
            return [f"{name}: {opening} {name}rest", *self._until(f"{name}rest", "TEXT", self._syntax.call_end)]
        document = SchemaDocument(tool.parameters or {}, f"The parameters of {tool.name!r}", tool.schema_origin)
        self.documents += (document,)
        with refusing(document):
            parameters, rules = [], list[str]()
            for number, (key, at, is_required) in enumerate(_parameters(document)):
                rule = f"{name}p{number}"
                parameters.append(f"({rule} GAP?)" + ("" if is_required else "?"))
                openings = [" GAP? ".join(map(self._tag, tags)) for tags in self._openings(key, document, at)]
                rules.append(f"{rule}: ({' | '.join(openings)}) {rule}v")
                rules += self._value(f"{rule}v", document, at)
        closing = self._tag(self._syntax.call_end)
        return [f"{name}: {opening} GAP? {' '.join(parameters)} {closing}", *rules]

    def _openings(self, key: str, document: SchemaDocument, at: Subschema) -> list[tuple[str, ...]]:
        """The tags before a value, in each way in which they may be written."""
        if not self._syntax.states_text:
            return [self._syntax.parameter(key)]
        types = frozenset[str]().union(*(_types(kind) for kind in _alternatives(document, at)))
        stated = [
            word for word, is_possible in (("true", "string" in types), ("false", types - {"string"})) if is_possible
        ]
        return [self._syntax.parameter(f'{key}" string="{word}') for word in stated]

    def _value(self, rule: str, document: SchemaDocument, at: Subschema) -> list[str]:
        """Rules of a value with its closing tag."""
        gap, end = "BREAK?" if self._syntax.breaks else "", self._syntax.parameter_end
        kinds = list(_alternatives(document, at))
        if all(kind.values is not None for kind in kinds):
            values = [value for kind in kinds for value in kind.values or ()]
            texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
            listed = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts if text)
            if not listed:
                raise Unenforceable(at.path, "no value fits it")
            return [f"{rule}: {gap} ({listed}) {gap} {self._tag(end)}"]
        if any("string" in kind.types for kind in kinds):
            return self._until(rule, self._text(kinds), end)
        normalizer = Normalizer()
        schema = schema_text(normalizer.add(document, at), normalizer.definitions)
        return [f"{rule}: GAP? {rule}j GAP? {self._tag(end)}", f"{rule}j: %json {schema}"]

    def _text(self, kinds: Sequence[Subschema]) -> str:
        """The text of a value in Lark, the line breaks beside it included."""
        for kind in kinds:
            for keyword in ("pattern", "format", "minLength", "maxLength"):
                is_bound = keyword in kind.keywords and (keyword != "format" or kind.keywords["format"] in FORMATS)
                if is_bound and (len(kinds) > 1 or keyword in ("pattern", "format")):
                    reason = 'a text between tags can\'t be held to it; set tool_choice to "required"'
                    raise Unenforceable(f"{kind.path}.{keyword}", reason)
        least, most = kinds[0].keywords.get("minLength", 0), kinds[0].keywords.get("maxLength")
        if not least and most is None:
            return "TEXT"
        gap = "\\n?" if self._syntax.breaks else ""
        return f"/{gap}(.|\\n){{{int(least)},{'' if most is None else int(most)}}}{gap}/"

    def _until(self, rule: str, text: str, end: str) -> list[str]:
        """Rules of text up to a closing tag: lazy, so that it ends at the first, unless that is a control token."""
        pieces = self._vocabulary.split(end)
        if isinstance(pieces[0], int):
            return [f"{rule}: {text} {in_lark(pieces)}"]
        return [f"{rule}: {rule}l {in_lark(pieces[1:])}", f"{rule}l[lazy]: {text} {in_lark(pieces[:1])}"]

    def _tag(self, text: str) -> str:
        return in_lark(self._vocabulary.split(text))


def _parameters(document: SchemaDocument) -> Iterator[tuple[str, Subschema, bool]]:
    """The parameters of a function: name, schema, whether it is required. Raises Unenforceable."""
    root = _dereferenced(document, document.root)
    if (other := next((word for word in root.keywords if word in COMBINING), None)) is not None:
        raise Unenforceable(
            f"{root.path}.{other}", "parameters between tags are listed in properties, and nowhere else"
        )
    properties, required = root.keywords.get("properties", {}), root.keywords.get("required", ())
    if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
        raise Unenforceable(root.path, "properties is an object, and required a list")
    for name in required:
        if name not in properties:
            raise Unenforceable(f"{root.path}.required", f"{name!r} is not in properties")
    for name, value in properties.items():
        at = root.child("properties", properties).child(name, value)
        if value is not False:
            yield name, at, name in required


def _alternatives(document: SchemaDocument, at: Subschema) -> Iterator[Subschema]:
    """The schemas of which a value fits one, references followed."""
    at = _dereferenced(document, at)
    union = next((word for word in UNIONS if isinstance(at.keywords.get(word), list)), None)
    if union is None or at.values is not None:
        yield at
        return
    for index, option in enumerate(at.keywords[union]):
        yield from _alternatives(document, at.child(union, at.keywords[union]).child(index, option))


def _types(kind: Subschema) -> frozenset[str]:
    """The types of the values that fit a schema without references."""
    if kind.values is None:
        return frozenset(kind.types)
    return frozenset("string" if isinstance(value, str) else "other" for value in kind.values)


def _dereferenced(document: SchemaDocument, at: Subschema) -> Subschema:
    for _ in range(MAX_REFERENCES):
        keyword = next((word for word in REFERENCES if word in at.keywords), None)
        if keyword is None:
            return at
        at = document.resolve(at, keyword)
    raise Unenforceable(at.path, "too many references to references")


def tag_syntax(reader: object) -> TagSyntax | None:
    """The syntax that a reader reads; None where it is another, or its opening tags hold more than a name."""
    if isinstance(reader, TagReader) and reader.end:
        call, parameter = _opening(*reader.call), _opening(*reader.parameter)
        if call and parameter:
            return TagSyntax(
                call,
                reader.call_end,
                lambda name: (parameter(name),),
                reader.parameter_end,
                reader.breaks,
                states_text=DSML in reader.parameter[0],
            )
    if isinstance(reader, KeyedCalls) and not reader.name_end:
        key_start, key_end = reader.key
        return TagSyntax(
            str, reader.call_end, lambda name: (f"{key_start}{name}{key_end}", reader.value[0]), reader.value[1]
        )
    return None


def _opening(begin: str, end: str) -> Callable[[str], str] | None:
    """An opening tag as a function of the name in it."""
    if begin.endswith("name="):
        return lambda name: f'{begin}"{name}"{end}'
    if begin.endswith("="):
        return lambda name: f"{begin}{name}{end}"
    if re.fullmatch(rf"<(\w+:|{DSML})?(invoke|parameter)", begin):
        return lambda name: f'{begin} name="{name}"{end}'
    return None
