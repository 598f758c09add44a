"""OpenAPI 3.1 document, made from the declarations that validate, and the page that shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from mlxserver.api.dialect import Api
from mlxserver.api.endpoint import Endpoint
from mlxserver.api.response_schemas import RESPONSE_SCHEMAS
from mlxserver.api.schema.parameters import json_schema
from mlxserver.api.schema.response_shapes import named

PLACE = re.compile(r"\{(\w+)\}")  # of a parameter in a path
FAILURES = {
    "400": "The request can't be understood or honoured; param names what is wrong.",
    "404": "There is no such model or path.",
    "409": "The model is in another state than the request needs.",
    "413": "The body is too large.",
    "415": "The body has an unknown coding or charset.",
    "429": "As many requests wait as may.",
    "507": "The model does not fit in memory; the projection says why.",
    "default": "The request failed.",
}


def document(endpoints: Sequence[Endpoint], title: str, version: str) -> dict[str, Any]:
    """The description of these endpoints."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    requests = {each.request.__name__: json_schema(each.request) for each in endpoints if each.request}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": {**requests, **RESPONSE_SCHEMAS}},
    }


def page(document: dict[str, Any]) -> str:
    """The document as one HTML page that needs nothing else."""
    title = escape(document["info"]["title"])
    sections = "".join(_sections(document))
    return f'<!doctype html><meta charset="utf-8"><title>{title}</title>{STYLE}<h1>{title}</h1>{sections}'


STYLE = """<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{margin:2.5rem 0 0;font-size:1.1rem}code,h2{font-family:ui-monospace,monospace}
table{border-collapse:collapse;width:100%;margin:.5rem 0}td{border-top:1px solid #ddd;padding:.3rem .6rem;
vertical-align:top}td:first-child{white-space:nowrap}small{color:#666}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}td{border-color:#444}small{color:#999}}
</style>"""


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": endpoint.name, "summary": endpoint.summary}
    if names := PLACE.findall(endpoint.path):
        schema = {"type": "string"}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]
    if endpoint.request:
        body = {"application/json": {"schema": named(endpoint.request.__name__)}}
        operation["requestBody"] = {"required": True, "content": body}
    error = {"application/json": {"schema": named(endpoint.api.error_schema)}}
    failures = {status: {"description": meaning, "content": error} for status, meaning in FAILURES.items()}
    operation["responses"] = {"200": {"description": endpoint.summary, "content": _content(endpoint)}, **failures}
    return operation


def _content(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.response is None:
        return {endpoint.media: {"schema": {"type": "string"}}}
    answers = [named(name) for name in (endpoint.response, *endpoint.others)]
    content: dict[str, Any] = {"application/json": {"schema": {"anyOf": answers} if endpoint.others else answers[0]}}
    if endpoint.chunk:
        content[endpoint.api.stream_media] = {"schema": _part(endpoint.chunk, endpoint.api)}
    return content


def _part(chunk: str, api: Api) -> dict[str, Any]:
    """The schema of one part of a stream: of a server-sent event, or of a line of JSON."""
    is_event = api.stream_media == "text/event-stream"
    return _event(chunk, api) if is_event else {"anyOf": [named(chunk), named(api.error_schema)]}


def _event(chunk: str, api: Api) -> dict[str, Any]:
    """The schema of one server-sent event: a chunk, an error that ends the stream, or [DONE]."""
    content = {"anyOf": [named(chunk), named(api.error_schema)]}
    payload: dict[str, Any] = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    if api.ends_with_done:
        payload = {"anyOf": [{"const": "[DONE]"}, payload]}
    return {"type": "object", "properties": {"data": payload}, "required": ["data"]}


def _sections(document: dict[str, Any]) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation['summary'])}</p>"
            if "requestBody" in operation:
                reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                yield _table(document["components"]["schemas"][reference.rpartition("/")[2]])


def _table(schema: dict[str, Any]) -> str:
    rows = (_row(name, field, name in schema["required"]) for name, field in schema["properties"].items())
    return f"<table>{''.join(rows)}</table>"


def _row(name: str, field: dict[str, Any], is_required: bool) -> str:
    choices = [choice for choice in field.get("anyOf", [field]) if choice != {"type": "null"}]
    kind = " or ".join(_kind(choice) for choice in choices)
    note = "required" if is_required else f"default {field['default']}" if field.get("default") is not None else ""
    cells = (f"<code>{escape(name)}</code>", f"<small>{escape(kind)}</small>", escape(field["description"]), note)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(choice) for choice in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema]
    names = schema.get("type", "any")
    return " ".join([names if isinstance(names, str) else "/".join(names), *bounds])
