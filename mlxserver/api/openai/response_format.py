"""Response format: text, any JSON object, or a JSON schema.

Rule: a checked format is None for text, else {"schema": a JSON schema, or None for any object}.
"""

from __future__ import annotations

from typing import Any

from mlxserver.api.schema.json_schema import check_shape
from mlxserver.api.schema.parameters import ValidationFailed, invalid

JSON_SCHEMA: dict[str, Any] = {
    "type": ["object", "null"],
    "properties": {
        "name": {"type": ["string", "null"]},
        "description": {"type": ["string", "null"]},
        "schema": {"type": ["object", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
    "additionalProperties": False,
}
FORMAT: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": JSON_SCHEMA},
    "required": ["type"],
    "additionalProperties": False,
}


def check_response_format(value: Any, param: str) -> dict[str, Any] | None:
    """The format by rule. `strict` changes nothing: every schema is enforced. Raises ValidationFailed."""
    check_shape(value, FORMAT, param)
    kind, described = value["type"], value.get("json_schema")
    if kind == "json_schema":
        if described is None:
            raise invalid(f"{param}.json_schema", described, 'an object with a "schema"')
        return {"schema": described.get("schema")}
    if described is not None:
        raise ValidationFailed(f"'{param}.json_schema' needs the type 'json_schema'.", f"{param}.json_schema")
    return {"schema": None} if kind == "json_object" else None
