"""Checks against the published OpenAPI document."""

import jsonschema

from mlxserver.api.response_schemas import ANSWER_SHAPES


def check(answer, shape):
    """The answer is of the published shape."""
    schema = {"$ref": f"#/components/schemas/{shape}", "components": {"schemas": ANSWER_SHAPES}}
    jsonschema.validate(answer, schema, jsonschema.Draft202012Validator)
    return answer
