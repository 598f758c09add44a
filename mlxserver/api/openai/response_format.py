"""Response format: text, any JSON object, or a JSON schema.

The schema is at {"type": "json_schema", "json_schema": {"schema": ...}}, or, as other servers and older clients have
it, beside the type: {"type": "json_object" or "json_schema", "schema": ...}.
"""

from __future__ import annotations

from typing import Any

from mlxserver.api.schema.json_schema import check_shape
from mlxserver.api.schema.parameters import ValidationFailed, invalid
from mlxserver.engine.requests import JsonFormat

SCHEMA: dict[str, Any] = {"type": ["object", "null"]}
JSON_SCHEMA: dict[str, Any] = {
    "type": ["object", "null"],
    "properties": {
        "name": {"type": ["string", "null"]},
        "description": {"type": ["string", "null"]},
        "schema": SCHEMA,
        "strict": {"type": ["boolean", "null"]},
    },
    "additionalProperties": False,
}
FORMAT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": JSON_SCHEMA,
        "schema": SCHEMA,
    },
    "required": ["type"],
    "additionalProperties": False,
}


def check_response_format(value: Any, param: str) -> JsonFormat | None:
    """The format; None for text. `strict` changes nothing: every schema is enforced. Raises ValidationFailed."""
    check_shape(value, FORMAT, param)
    kind, described, schema = value["type"], value.get("json_schema"), value.get("schema")
    if kind == "json_schema" and described is not None:
        if schema is not None:
            raise ValidationFailed(f"The schema is in '{param}.json_schema' already.", f"{param}.schema")
        return JsonFormat(described.get("schema"), f"{param}.json_schema.schema")
    if described is not None:
        raise ValidationFailed(f"'{param}.json_schema' needs the type 'json_schema'.", f"{param}.json_schema")
    if kind == "json_schema" and schema is None:
        raise invalid(f"{param}.json_schema", described, 'an object with a "schema"')
    if kind == "text" and schema is not None:
        raise ValidationFailed(f"'{param}.schema' needs the type 'json_object'.", f"{param}.schema")
    return None if kind == "text" else JsonFormat(schema, f"{param}.schema")
