"""Checks against the published OpenAPI document."""

import jsonschema

from mlxserver.api.response_schemas import RESPONSE_SCHEMAS


def check(answer, name):
    """Check an answer against the published schema of this name, and return it."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": RESPONSE_SCHEMAS}}
    jsonschema.validate(answer, schema, jsonschema.Draft202012Validator)
    return answer
