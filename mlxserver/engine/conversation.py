"""Conversation: messages and tools as every dialect means them.

A dialect parses its wire format into these types and refuses what is malformed there. The engine reads nothing else,
and decides only what the chat template of a model can take. Plain frozen data; knows neither MLX nor HTTP.

Rule 1: only an assistant's message has Reasoning and ToolCall parts.
Rule 2: a tool's message is one ToolResult.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
UNREADABLE = "arguments"
"""Name under which a template gets arguments that are no JSON object."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is meant for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image for the model to see.

    data: its file as it was sent (PNG, JPEG, WebP, GIF, BMP), b"" until an image that is named by its URL was fetched.
    origin: where the client wrote it, as its dialect names it: "messages[0].content[1].image_url". detail: how much of
    its resolution the model gets; "low" is a small picture, the others are the file's.
    """

    data: bytes = field(repr=False)
    origin: str = ""
    url: str | None = None
    detail: Literal["auto", "low", "high"] = "auto"

    @property
    def digest(self) -> str:
        """SHA-256 of the file, and of a low detail, which makes it another picture; in hexadecimal."""
        return hashlib.sha256(self.data + b"low" if self.detail == "low" else self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made. The id, "" where the client leaves it out, pairs it with its result.

    arguments: the object that the model wrote. text: what the model wrote where that is no JSON object; arguments then
    hold it as their only value.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]
    text: str | None = None

    @classmethod
    def of_text(cls, id: str, name: str, text: str) -> ToolCall:
        """A call whose arguments are JSON text, which the model may have written wrong or not to its end."""
        try:
            arguments = json.loads(text) if text.strip() else {}
            json.dumps(arguments, ensure_ascii=False).encode()  # finds lone surrogates
        except (ValueError, RecursionError):
            return cls(id, name, {UNREADABLE: text}, text)
        return cls(id, name, arguments) if isinstance(arguments, dict) else cls(id, name, {UNREADABLE: text}, text)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The outcome of a call. name: of the function, None where the client leaves it out. images: shown with it."""

    call_id: str
    text: str
    name: str | None = None
    images: tuple[Image, ...] = ()


Part = Text | Image | Reasoning | ToolCall | ToolResult


@dataclass(frozen=True, slots=True)
class Message:
    """One message. origin: where the client wrote it, as its dialect names it: "messages[2]". name: of the author."""

    role: Role
    parts: tuple[Part, ...]
    origin: str = ""
    name: str | None = None

    @property
    def text(self) -> str:
        """The text, or that of the tool's result; empty where there is none."""
        return "".join([part.text for part in self.parts if isinstance(part, (Text, ToolResult))])

    @property
    def images(self) -> tuple[Image, ...]:
        """The images, in order; those of a tool's result, too."""
        own = [part for part in self.parts if isinstance(part, Image)]
        return (*own, *[image for part in self.parts if isinstance(part, ToolResult) for image in part.images])

    @property
    def reasoning(self) -> str:
        """The reasoning, a blank line between its parts; empty where there is none."""
        return "\n\n".join([part.text for part in self.parts if isinstance(part, Reasoning)])

    @property
    def calls(self) -> list[ToolCall]:
        """The tool calls, in order."""
        return [part for part in self.parts if isinstance(part, ToolCall)]

    @property
    def result(self) -> ToolResult | None:
        """The tool's result."""
        return next((part for part in self.parts if isinstance(part, ToolResult)), None)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    parameters: JSON Schema of its arguments. strict: whether they are held to it. origin: where the client wrote the
    function, as its dialect names it: "tools[0].function". schema_field: the name that the schema has there. held:
    another schema, to which the arguments are held in the place of `parameters`, and which the model is not shown.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool | None = None
    origin: str = ""
    schema_field: str = "parameters"
    held: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def is_strict(self) -> bool:
        """Whether the arguments are held to a schema, whatever the choice among the tools."""
        return bool(self.strict) or self.held is not None

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema to which arguments are held."""
        return self.held or self.parameters or {}

    @property
    def strict_origin(self) -> str:
        """Where the client asked for that."""
        return self.schema_origin if self.held is not None else f"{self.origin}.strict"

    @property
    def schema_origin(self) -> str:
        """Where the client wrote the schema."""
        return f"{self.origin}.{self.schema_field}"

    @property
    def function(self) -> dict[str, Any]:
        """The function in OpenAI's JSON, which chat templates and the parsers of calls take, without what is None."""
        fields = {"description": self.description, "parameters": self.parameters, "strict": self.strict}
        return {"name": self.name} | {name: value for name, value in fields.items() if value is not None}
