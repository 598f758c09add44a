"""JSON Schemas as grammars: what is taken, what is refused and where. What a grammar admits keeps the schema."""

import contextlib
import json
import random

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxserver.engine.conversation import Tool
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.requests import ToolChoice
from mlxserver.engine.sampling.grammars import Grammars
from mlxserver.engine.sampling.json_grammars import json_grammar
from mlxserver.engine.sampling.tool_grammars import forced_calls


@pytest.fixture(scope="module")
def grammars(tiny_tokenizer):
    return Grammars(tiny_tokenizer, len(tiny_tokenizer.vocab))


@pytest.fixture(scope="module")
def admits(grammars, tiny_tokenizer):
    """Whether the grammar of a schema, or one that is made already, admits a whole text."""

    def check(grammar, text):
        grammar = json_grammar(grammar, "format.schema") if isinstance(grammar, dict) else grammar
        matcher = grammars.compile(grammar).deep_copy()
        tokens = tiny_tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return check


def refusal(grammars, schema):
    """Path and message of a schema's refusal."""
    with pytest.raises(PromptRejected) as refused:
        grammars.compile(json_grammar(schema, "schema"))
    return refused.value.param, str(refused.value)


NOTES = {
    "$schema": "https://example.com/unknown",
    "$id": "https://example.com/a",
    "$comment": "c",
    "$vocabulary": {},
    "title": "t",
    "description": "d",
    "default": None,
    "examples": [1],
    "deprecated": True,
    "readOnly": True,
    "writeOnly": False,
    "contentEncoding": "base64",
    "contentMediaType": "text/html",
    "contentSchema": {"not": {}},
    "nullable": False,
    "discriminator": {"propertyName": "kind"},
    "x-order": ["a"],
    "x-guidance": {"lenient": True, "whitespace_flexible": True},
    "then": False,
    "else": False,
    "minContains": 3,
    "maxContains": 3,
    "additionalItems": False,
    "$defs": {"unused": {"not": {"type": "string"}}},
}


@pytest.mark.parametrize("keyword", NOTES)
def test_annotations_are_taken(admits, keyword):
    schema = {"type": "array", "items": {"type": "integer"}, keyword: NOTES[keyword]}
    assert admits(schema, "[1, 2]") and not admits(schema, '["a"]')


ALWAYS_TRUE = [
    {"propertyNames": {"type": "string"}},
    {"propertyNames": True},
    {"unevaluatedProperties": True},
    {"unevaluatedProperties": {}},
    {"unevaluatedItems": True},
    {"uniqueItems": False},
    {"uniqueItems": True, "maxItems": 1},
    {"uniqueItems": True, "type": "object"},
    {"minItems": 0},
    {"minProperties": 0.0},
    {"contains": {"type": "string"}, "minContains": 0},
    {"dependentRequired": {}},
    {"dependentRequired": {"a": []}},
    {"dependentSchemas": {"a": True}},
    {"dependencies": {"a": [], "b": {}}},
    {"not": False},
    {"not": {"not": {}}},
    {"if": {"type": "string"}},
    {"if": {"type": "string"}, "then": True, "else": {}},
    {"pattern": ".*"},
    {"pattern": ""},
    {"format": "anything"},
    {"format": "date", "type": "object"},
    {"required": False},
    {"items": None, "maxLength": None, "enum": None, "additionalProperties": None, "properties": None},
    {"additionalProperties": True},
    {"additionalItems": False},
]


@pytest.mark.parametrize("keywords", ALWAYS_TRUE, ids=json.dumps)
def test_what_is_always_true_is_taken(admits, keywords):
    schema = {"type": "object", "properties": {"x": keywords}, "required": ["x"]}
    assert admits(schema, '{"x": {}}') or admits(schema, '{"x": []}')


UNENFORCED = [
    ({"pattern": "^(?!a)b"}, ".pattern", "look-around"),
    ({"pattern": r"(a)\1"}, ".pattern", "backreference"),
    ({"not": {"type": "string"}}, ".not", "can't be enforced"),
    ({"if": {"type": "string"}, "then": {"minLength": 1}}, ".if", "can't be enforced"),
    ({"uniqueItems": True}, ".uniqueItems", "can't be enforced"),
    ({"contains": {"const": 1}}, ".contains", "can't be enforced"),
    ({"dependentRequired": {"a": ["b"]}}, ".dependentRequired", "can't be enforced"),
    ({"unevaluatedProperties": False, "anyOf": [{}]}, ".unevaluatedProperties", "beside"),
    ({"propertyNames": {"format": "uuid"}}, ".propertyNames", "names"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ".oneOf", "required constant"),
    ({"type": "nonsense"}, ".type", "nonsense"),
    ({"oneOf": [{"type": "string"}, {"minLength": 1}]}, ".oneOf", "required constant"),
    ({"minimum": 1e300}, ".minimum", "64 bits"),
    ({"minimum": "1"}, ".minimum", "number"),
    ({"$ref": "https://example.com/b.json#/a"}, ".$ref", "another document"),
    ({"$ref": "other.json"}, ".$ref", "another document"),
    ({"$ref": "#/nowhere"}, ".$ref", "nothing"),
    ({"$ref": "#nowhere"}, ".$ref", "nothing"),
    ({"$ref": "#/properties/x"}, ".$ref", "itself"),
    ({"$ref": 7}, ".$ref", "string"),
    ({"properties": []}, ".properties", "object"),
    ({"allOf": {}}, ".allOf", "list"),
    ({"items": "a"}, ".items", "a schema is"),
]


@pytest.mark.parametrize(("keywords", "place", "reason"), UNENFORCED, ids=lambda value: json.dumps(value)[:40])
def test_what_can_not_be_enforced_is_refused_with_its_path(grammars, keywords, place, reason):
    param, message = refusal(grammars, {"type": "object", "properties": {"x": keywords}})
    assert param == f"schema.properties.x{place}"
    assert reason in message and f"properties.x{place}" in message and "\n" not in message


def test_a_fault_is_found_behind_a_reference(grammars):
    schema = {"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"items": [{"pattern": "(?=a)b"}]}}}
    assert refusal(grammars, schema)[0] == "schema.$defs.a.items[0].pattern"


def test_a_schema_that_nothing_fits_is_refused(grammars):
    assert refusal(grammars, {"required": ["a"], "type": "object", "properties": {"a": False}})[0] == "schema"
    assert refusal(grammars, {"enum": []})[0] == "schema.enum"
    assert refusal(grammars, {"anyOf": [{"$ref": "#"}]})[0].startswith("schema")
    unfit = {
        "type": "object",
        "required": ["a"],
        "properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}},
    }
    assert refusal(grammars, unfit)[0].startswith("schema.properties.a")


def test_a_fault_of_one_tool_of_many_is_named(grammars):
    sound = {"type": "object", "properties": {"city": {"type": "string"}}}
    faulty = {"type": "object", "properties": {"to": {"type": "string", "pattern": r"^(?!\.)[a-z@.]+$"}}}
    tools = [
        Tool("get_weather", None, sound, origin="tools[0].function"),
        Tool("mail", None, faulty, origin="tools[1].function"),
    ]
    with pytest.raises(PromptRejected, match="'mail'.*properties.to.pattern.*look-around") as refused:
        grammars.compile(forced_calls(tools, ToolChoice("required")))
    assert refused.value.param == "tools[1].function.parameters.properties.to.pattern"


LIST = {"type": "object", "properties": {"next": {"$ref": "#"}, "value": {"type": "integer"}}, "required": ["value"]}
REFERRING = {
    "a pointer": {"$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}},
    "definitions": {"$ref": "#/definitions/a", "definitions": {"a": {"const": 1}}},
    "an escaped pointer": {"$ref": "#/$defs/a~1b~0%20%25", "$defs": {"a/b~ %": {"const": 1}}},
    "a pointer into a list": {"$ref": "#/$defs/a/anyOf/1", "$defs": {"a": {"anyOf": [{"const": 2}, {"const": 1}]}}},
    "a place that is no keyword": {"$ref": "#/components/schemas/a", "components": {"schemas": {"a": {"const": 1}}}},
    "an anchor": {"$ref": "#x", "$defs": {"a": {"$anchor": "x", "const": 1}}},
    "an anchor of draft 7": {"$ref": "#x", "$defs": {"a": {"$id": "#x", "const": 1}}},
    "an id": {"$ref": "b", "$id": "https://example.com/a", "$defs": {"a": {"$id": "b", "const": 1}}},
    "an absolute id": {"$ref": "https://example.com/b", "$defs": {"a": {"$id": "https://example.com/b", "const": 1}}},
    "its own id": {
        "$ref": "https://example.com/a#/$defs/a",
        "$id": "https://example.com/a",
        "$defs": {"a": {"const": 1}},
    },
    "an id of draft 4": {"$ref": "urn:jsonschema:A", "definitions": {"a": {"id": "urn:jsonschema:A", "const": 1}}},
    "a pointer within an id": {
        "$ref": "b#/$defs/c",
        "$id": "https://example.com/a",
        "$defs": {"c": {"const": 2}, "a": {"$id": "b", "$defs": {"c": {"const": 1}}}},
    },
    "a scope of its own": {
        "$ref": "#/$defs/a",
        "$defs": {
            "c": {"const": 2},
            "a": {"$id": "https://example.com/b", "$ref": "#/$defs/c", "$defs": {"c": {"const": 1}}},
        },
    },
    "an anchor within an id": {
        "$ref": "b#x",
        "$id": "https://example.com/a",
        "$defs": {"o": {"$anchor": "x", "const": 2}, "a": {"$id": "b", "$defs": {"c": {"$anchor": "x", "const": 1}}}},
    },
    "a dynamic anchor": {"$dynamicRef": "#x", "$defs": {"a": {"$dynamicAnchor": "x", "const": 1}}},
    "several references": {"$ref": "#/$defs/b", "$defs": {"a": {"const": 1}, "b": {"$ref": "#/$defs/a"}}},
    "a reference beside keywords": {"maximum": 1, "$ref": "#/$defs/a", "$defs": {"a": {"enum": [1, 2]}}},
    "a reference beside allOf": {"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1, 2]}}, "allOf": [{"enum": [1, 3]}]},
}


@pytest.mark.parametrize("kind", REFERRING)
def test_references_are_followed(admits, kind):
    assert admits(REFERRING[kind], "1")
    assert not admits(REFERRING[kind], "2")


@pytest.mark.parametrize("kind", REFERRING)
def test_a_tool_with_references_can_be_forced_beside_others(admits, kind):
    inner = REFERRING[kind]
    with_references = {"type": "object", "properties": {"x": {"$ref": "#/$defs/all"}}, "required": ["x"]}
    # The root of the references must be the root of the document: what is inside goes where it was.
    schema = {
        **with_references,
        **{name: inner[name] for name in inner if name not in ("$ref", "$dynamicRef", "maximum", "allOf")},
    }
    schema["$defs"] = {
        **inner.get("$defs", {}),
        "all": {name: inner[name] for name in inner if name in ("$ref", "$dynamicRef", "maximum", "allOf")},
    }
    tools = [Tool("one", None, LIST), Tool("two", None, schema), Tool("three", None, LIST)]
    grammar = forced_calls(tools, ToolChoice("required"))
    assert admits(grammar, '[{"name": "two", "arguments": {"x": 1}}]')
    assert not admits(grammar, '[{"name": "two", "arguments": {"x": 2}}]')
    assert admits(grammar, '[{"name": "three", "arguments": {"next": {"value": 1}, "value": 3}}]')


def test_a_schema_may_contain_itself(admits):
    assert admits(LIST, '{"next": {"next": {"value": 1}, "value": 2}, "value": 3}')
    assert not admits(LIST, '{"next": {"next": {}, "value": 2}, "value": 3}')


ENFORCED = [
    ({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}}, {"b": 1}, {"c": 1}),
    ({"propertyNames": {"$ref": "#/$defs/n"}, "$defs": {"n": {"enum": ["a"]}}}, {"a": []}, {"b": []}),
    ({"propertyNames": {"enum": ["a", "b"]}, "properties": {"a": {"const": 1}, "c": {}}}, {"a": 1}, {"c": 1}),
    ({"propertyNames": {"pattern": "^a"}, "additionalProperties": {"const": 1}}, {"ab": 1}, {"b": 1}),
    ({"propertyNames": {"maxLength": 2}}, {"ab": 1}, {"abc": 1}),
    ({"propertyNames": False}, {}, {"a": 1}),
    ({"unevaluatedProperties": False, "properties": {"a": {}}}, {"a": 1}, {"b": 1}),
    ({"unevaluatedProperties": False, "additionalProperties": {"const": 1}}, {"b": 1}, {"b": 2}),
    ({"properties": {"a": {"items": [{"const": 1}], "additionalItems": {"const": 2}}}}, {"a": [1, 2]}, {"a": [1, 1]}),
    ({"properties": {"a": {"prefixItems": [{"const": 1}], "unevaluatedItems": False}}}, {"a": [1]}, {"a": [1, 1]}),
    ({"properties": {"a": {"minimum": 3, "exclusiveMinimum": True}}}, {"a": 4}, {"a": 3}),
    ({"properties": {"a": {"minimum": -(2**63), "maximum": 2**64}}}, {"a": 4}, None),
    ({"properties": {"a": {"type": "string", "maxLength": 2.0}}}, {"a": "ab"}, {"a": "abc"}),
]


@pytest.mark.parametrize(("schema", "fit", "unfit"), ENFORCED, ids=lambda value: json.dumps(value)[:60])
def test_what_can_be_said_in_other_words_is_enforced(admits, schema, fit, unfit):
    schema = {"type": "object", **schema}
    is_old = "exclusiveMinimum" in str(schema) or "additionalItems" in str(schema)
    jsonschema.validate(fit, schema, jsonschema.Draft4Validator if is_old else jsonschema.Draft202012Validator)
    assert admits(schema, json.dumps(fit))
    assert unfit is None or not admits(schema, json.dumps(unfit))


def test_options_that_exclude_each_other_are_found_behind_references(admits):
    """As generators of schemas write a union of classes that differ by a constant."""
    kinds = {
        name: {"type": "object", "properties": {"kind": {"const": name}, "x": {}}, "required": ["kind"]}
        for name in "abc"
    }
    one_of = [{"$ref": f"#/$defs/{name}"} for name in kinds]
    schema = {"$defs": kinds, "oneOf": one_of, "discriminator": {"propertyName": "kind"}}
    assert admits(schema, '{"kind": "b", "x": 1}')
    assert not admits(schema, '{"kind": "d"}')
    both = {**schema, "anyOf": [{"properties": {"x": {"const": 1}}, "type": "object", "required": ["x"]}]}
    assert admits(both, '{"kind": "b", "x": 1}') and not admits(both, '{"kind": "b", "x": 2}')


@pytest.mark.parametrize(
    ("text", "is_admitted"),
    [
        ('{"a":1,"b":[1,2]}', True),
        ('{"a": 1, "b": [1, 2]}', True),
        ('{\n  "a": 1,\n  "b": [\n    1,\n    2\n  ]\n}', True),
        ('{\n\t"a": 1, "b": []}', True),
        ('{ "a" : 1 , "b" : [ ] }', True),
        ('{"a":  1, "b": []}', False),
        ('{\n\n"a": 1, "b": []}', False),
        ('{"a": 1, "b": []}\n', False),
        ("{\n" + " " * 17 + '"a": 1, "b": []}', False),
    ],
)
def test_white_space_is_what_models_write_and_bounded(admits, text, is_admitted):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "array"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    assert admits(schema, text) == is_admitted


def test_behind_reasoning_two_line_breaks_may_come_first(admits):
    grammar = json_grammar({"const": 1}, "schema", thinks=True)
    assert [admits(grammar, text) for text in ("1", "\n1", "\n\n1", "\n\n\n1", " 1")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def deep(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_schema_that_is_too_deep_or_too_large_is_refused(grammars):
    assert "nested too deeply" in refusal(grammars, deep(100_000))[1]
    chain = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 40} for n in range(2000)}
    assert "more than 20000 schemas" in refusal(grammars, {"$ref": "#/$defs/a0", "$defs": chain | {"a2000": {}}})[1]


# Random schemas

NAMES = st.sampled_from(["a", "b", "a/b", "~", "%", "$ref", "type"])
SMALL = st.integers(0, 3)
NUMBERS = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number"])},
    optional={"minimum": st.integers(-9, 0), "maximum": st.integers(1, 99), "multipleOf": st.sampled_from([1, 2.0])},
)
STRINGS = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={"minLength": SMALL, "maxLength": st.integers(3, 5), "pattern": st.sampled_from(["^[a-z]*$", "", "x?"])},
)
CONSTANTS = st.one_of(
    st.builds(lambda value: {"const": value}, st.sampled_from([None, True, 0, 1.5, "", "ab", [], {"a": 1}])),
    st.builds(lambda values: {"enum": values}, st.lists(st.sampled_from(["a", 1, None, False]), min_size=1)),
)
TAKEN = st.dictionaries(
    st.sampled_from(sorted(set(NOTES) - {"$id", "$schema", "$defs", "additionalItems"})), st.none()
).map(lambda chosen: {name: NOTES[name] for name in chosen})
REFERENCE = st.builds(lambda name: {"$ref": f"#/$defs/{name}"}, st.sampled_from(["a", "b~1~0%20"]))


def combined(schemas):
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "maxItems": SMALL},
        optional={
            "items": schemas,
            "prefixItems": st.lists(schemas, min_size=1, max_size=2),
            "uniqueItems": st.just(False),
        },
    )
    objects = st.fixed_dictionaries(
        {"type": st.just("object"), "additionalProperties": st.just(False)},
        optional={
            "properties": st.dictionaries(NAMES, schemas, max_size=3),
            "required": st.lists(NAMES, unique=True, max_size=2),
        },
    )
    maps = st.builds(
        lambda names, value: {"type": "object", "propertyNames": {"enum": names}, "additionalProperties": value},
        st.lists(NAMES, min_size=1, unique=True),
        schemas,
    )
    unions = st.builds(
        lambda word, options: {word: options},
        st.sampled_from(["anyOf", "oneOf", "allOf"]),
        st.lists(schemas, min_size=1, max_size=3),
    )
    return st.builds(lambda schema, notes: {**notes, **schema}, arrays | objects | maps | unions, TAKEN)


SCHEMAS = st.recursive(NUMBERS | STRINGS | CONSTANTS | REFERENCE, combined, max_leaves=6)


def walk(matcher, tokens, rng, limit=300):
    """Text of random admitted tokens, the shorter the likelier; None where the limit comes first."""
    text = ""
    for _ in range(limit):
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        assert not matcher.is_error(), matcher.get_error()
        admitted = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        choices = [token for token in admitted.tolist() if token in tokens]
        if matcher.is_accepting() and (rng.random() < 0.5 or not choices):
            return text
        assert choices
        closing = [token for token in choices if set(tokens[token]) <= set('"]},:0123456789')]
        token = rng.choice(closing if closing and rng.random() < 0.7 else choices)
        text += tokens[token]
        matcher.consume_token(token)
    return None


@pytest.fixture(scope="module")
def ascii_tokens(tiny_tokenizer):
    """Tokens that are text by themselves."""
    decoded = {token: tiny_tokenizer.decode([token]) for token in range(len(tiny_tokenizer.vocab))}
    special = set(tiny_tokenizer.all_special_ids)
    return {token: text for token, text in decoded.items() if text and text.isascii() and token not in special}


@settings(max_examples=150)
@given(schema=SCHEMAS, first=SCHEMAS, second=SCHEMAS, seed=st.integers(0, 2**32))
def test_what_a_grammar_admits_keeps_the_schema(grammars, ascii_tokens, schema, first, second, seed):
    document = {"$defs": {"a": first, "b/~ ": second}, "allOf": [schema]}
    try:
        matcher = grammars.compile(json_grammar(document, "schema"))
    except PromptRejected as refused:
        assert refused.param.startswith("schema")
        return
    text = walk(matcher.deep_copy(), ascii_tokens, random.Random(seed))
    if text is not None:
        with contextlib.suppress(RecursionError):  # of the validator, in a schema that contains itself at one place
            jsonschema.validate(json.loads(text), document, jsonschema.Draft202012Validator)
