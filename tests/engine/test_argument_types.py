"""Text that a model wrote for a parameter becomes the value that the schema says, and no other."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.engine.conversation import Tool
from mlxserver.engine.output.argument_types import Signatures, ValueWriter, type_of

TEXT, NULL, INTEGER, NUMBER = {"type": "string"}, {"type": "null"}, {"type": "integer"}, {"type": "number"}
BOOLEAN, OBJECT, ARRAY = {"type": "boolean"}, {"type": "object"}, {"type": "array"}
DEFINED = {"$defs": {"id": {"anyOf": [INTEGER, NULL]}, "loop": {"$ref": "#/$defs/loop"}, "a/b": TEXT}}


@pytest.mark.parametrize(
    ("schema", "written", "expected"),
    [
        (INTEGER, "5", "5"),
        (INTEGER, " -12\n", "-12"),
        (INTEGER, "1234567890123456789012345678901234567890", "1234567890123456789012345678901234567890"),
        (INTEGER, "5.0", "5"),
        (INTEGER, "5.5", '"5.5"'),
        (INTEGER, "five", '"five"'),
        (INTEGER, "007", '"007"'),
        (INTEGER, "", '""'),
        (NUMBER, "9007199254740993", "9007199254740993"),
        (NUMBER, "0.10000000000000000000001", "0.10000000000000000000001"),
        (NUMBER, "-1.5e+300", "-1.5e+300"),
        (NUMBER, "NaN", '"NaN"'),
        (NUMBER, "true", '"true"'),
        (BOOLEAN, "true", "true"),
        (BOOLEAN, "False", "false"),
        (BOOLEAN, "yes", '"yes"'),
        (BOOLEAN, "1", '"1"'),
        (TEXT, "null", '"null"'),
        (TEXT, "true", '"true"'),
        (TEXT, "123", '"123"'),
        (TEXT, '{"a": 1}', '"{\\"a\\": 1}"'),
        (TEXT, '"quoted"', '"\\"quoted\\""'),
        (TEXT, "  a\n\té\u2028", '"  a\\n\\té\u2028"'),
        ({"type": ["string", "null"]}, "123", '"123"'),
        ({"type": ["string", "null"]}, '{"a": 1}', '"{\\"a\\": 1}"'),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"type": ["string", "null"]}, "nullable", '"nullable"'),
        ({"type": "string", "nullable": True}, "null", "null"),
        ({"anyOf": [INTEGER, NULL]}, "5", "5"),
        ({"anyOf": [INTEGER, NULL]}, "None", "null"),
        ({"oneOf": [BOOLEAN, NULL]}, "true", "true"),
        ({"anyOf": [INTEGER, TEXT]}, "5", "5"),
        ({"anyOf": [INTEGER, TEXT]}, "5 apples", '"5 apples"'),
        ({"anyOf": [TEXT, {**ARRAY, "items": TEXT}]}, '["ls", "-l"]', '["ls", "-l"]'),
        ({"anyOf": [TEXT, ARRAY]}, "[not a list", '"[not a list"'),
        ({"enum": ["1", "2"]}, "1", '"1"'),
        ({"enum": [1, 2]}, "1", "1"),
        ({"enum": ["1", 2, None]}, "1", '"1"'),
        ({"const": "true"}, "true", '"true"'),
        ({"const": True}, "true", "true"),
        ({"allOf": [{"anyOf": [TEXT, INTEGER]}, INTEGER]}, "5", "5"),
        ({"allOf": [{"description": "any"}, TEXT]}, "5", '"5"'),
        ({"$ref": "#/$defs/id"}, "5", "5"),
        ({"$ref": "#/$defs/a~1b"}, "5", '"5"'),
        (OBJECT, '{"n": 9007199254740993.0, "x": [1]}', '{"n": 9007199254740993.0, "x": [1]}'),
        (OBJECT, "{'a': True, 'b': None, \"c\": false}", '{"a": true, "b": null, "c": false}'),
        (OBJECT, '{"a": "x\ny"}', '{"a": "x\\ny"}'),
        (OBJECT, "[1]", '"[1]"'),
        (ARRAY, "[1, NaN]", '"[1, NaN]"'),
        (ARRAY, "[" * 100_000, json.dumps("[" * 100_000)),
    ],
)
def test_the_schema_decides_what_a_value_is(schema, written, expected):
    kind = type_of(schema, DEFINED)
    assert kind.json(written) == expected
    assert in_pieces(kind, [written]) == in_pieces(kind, [written[:3], *written[3:9], written[9:]]) == expected


def in_pieces(kind, pieces):
    out = []
    writer = ValueWriter(out.append, kind)
    for piece in pieces:
        writer.feed(piece)
    writer.finish()
    return "".join(out)


@pytest.mark.parametrize("schema", [None, True, {}, {"type": "odd"}, {"$ref": "#/$defs/loop"}, {"$ref": "http://x"}, 7])
def test_a_schema_without_a_type_admits_every_value(schema):
    kind = type_of(schema, DEFINED)
    written = ("5", "null", "x", "[1]")
    assert [kind.json(text) for text in written] == ["5", "null", '"x"', "[1]"]


def test_a_parameter_that_no_schema_describes_is_text_unless_it_is_a_list_or_an_object():
    signatures = Signatures([Tool("f"), Tool("g", parameters={"type": "object", "properties": {"a": {}}})])
    for function, name in (("f", "a"), ("g", "a"), ("g", "b"), ("h", "a")):
        kind = signatures.parameter(function, name)
        assert [kind.json(text) for text in ("5", "null", "[1]", "{x")] == ['"5"', '"null"', "[1]", '"{x"']


def test_properties_and_items_are_found_in_the_parts_of_a_schema():
    schema = {"allOf": [{"properties": {"a": {"type": "array", "items": {"$ref": "#/x"}}}}], "x": INTEGER}
    kind = Signatures([Tool("f", parameters=schema)]).parameter("f", "a")
    assert (kind.types, kind.items.types) == ({"array"}, {"integer"})


SCHEMAS = st.sampled_from(
    [TEXT, INTEGER, NUMBER, BOOLEAN, OBJECT, ARRAY, {}, {"type": ["string", "null"]}, {"enum": ["a", 1]}]
) | st.lists(st.sampled_from([TEXT, INTEGER, NUMBER, BOOLEAN, OBJECT, ARRAY, NULL]), min_size=1).map(
    lambda parts: {"anyOf": parts}
)
FRAGMENTS = ["null", "true", "None", "-1", ".5", "e3", "{", "}", "[", "]", ",", ":", '"', "'", "a"]
WRITTEN = st.text() | st.lists(st.sampled_from(FRAGMENTS)).map("".join)


@given(SCHEMAS, WRITTEN, st.sampled_from([1, 2, 7, 1000]))
def test_a_value_is_valid_json_and_the_same_in_any_cut(schema, written, size):
    kind = type_of(schema, DEFINED)
    value = json.loads(kind.json(written))
    assert isinstance(value, str) is (value == written)
    assert in_pieces(kind, [written[at : at + size] for at in range(0, len(written), size)]) == kind.json(written)


@given(st.text(), st.integers(1, 4))
def test_text_is_emitted_as_it_comes(written, size):
    out = []
    writer = ValueWriter(out.append, type_of(TEXT, None))
    for at in range(0, len(written), size):
        writer.feed(written[at : at + size])
        assert json.loads("".join(out) + '"') == written[: at + size]
