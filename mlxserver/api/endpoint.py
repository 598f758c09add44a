"""Declaration of an endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlxserver.api.dialect import Api, Dialect
from mlxserver.api.openai.errors import OPENAI
from mlxserver.api.schema.parameters import Request


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint. name: its operation, and its handler unless it has a dialect.

    response: name of the JSON schema of its answer, None for text of type `media`. request: the body it takes.
    chunk: name of the schema of a stream's chunks, where the request can ask for a stream. dialect: of an endpoint that
    generates. manages: whether it takes an admin key, where there are keys. api: whose envelope its errors have.
    dialect_name: in metrics and the request log, where it is not the API's.
    others: names of the schemas of its answers to clients of other APIs, which are known by a header.
    """

    name: str
    method: Literal["GET", "POST", "DELETE", "HEAD"]
    path: str
    summary: str
    response: str | None
    request: type[Request] | None = None
    chunk: str | None = None
    dialect: type[Dialect] | None = None
    media: str = "text/html"
    manages: bool = False
    api: Api = OPENAI
    dialect_name: str = ""

    @property
    def label(self) -> str:
        """Name of its dialect in metrics and the request log."""
        return self.dialect_name or self.api.name

    others: tuple[str, ...] = ()
