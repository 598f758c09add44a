"""POST /v1/responses: the request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mlxserver.api.openai.generation import (
    NO_EFFECT,
    TOKEN_LIMIT,
    SamplingRequest,
    check_limit,
    keep_alive_parameter,
    stated_limit,
)
from mlxserver.api.openai.responses.items import INPUT, InputItem, check_input
from mlxserver.api.openai.responses.tools import CHOICE, TOOLS, Choice, ToolSet, check_tool_choice, check_tools
from mlxserver.api.openai.thinking import REASONING, Thinking, ThinkingRequest, check_reasoning, of_budget
from mlxserver.api.schema.json_schema import check_shape
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid
from mlxserver.engine.requests import JsonFormat

MAX_TOP_LOGPROBS = 20
LOGPROBS = "message.output_text.logprobs"
OPTIONAL_STRING = {"type": ["string", "null"]}
TEXT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "format": {
            "type": ["object", "null"],
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema"]},
                "name": OPTIONAL_STRING,
                "description": OPTIONAL_STRING,
                "schema": {"type": ["object", "null"]},
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["type"],
            "additionalProperties": False,
        },
        "verbosity": OPTIONAL_STRING,
    },
    "additionalProperties": False,
}
INCLUDE: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
METADATA: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
STREAM_OPTIONS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "include_obfuscation": {"type": ["boolean", "null"]},
        "include_usage": {"type": ["boolean", "null"]},
    },
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The form of the text. wire: as it is given back."""

    wire: dict[str, Any] = field(default_factory=lambda: {"format": {"type": "text"}})
    format: JsonFormat | None = None


@dataclass(frozen=True, slots=True)
class Reasoning(Thinking):
    """What `reasoning` states; the summary is given back, and changes nothing: it is always the whole reasoning."""

    summary: str | None = None


def check_text(value: Any, param: str) -> TextConfig:
    """The form of the text. Raises ValidationFailed."""
    check_shape(value, TEXT, param)
    form = value.get("format") or {"type": "text"}
    kind, schema = form["type"], form.get("schema")
    if kind == "json_schema" and schema is None:
        raise invalid(f"{param}.format.schema", schema, "a JSON schema")
    if kind != "json_schema" and schema is not None:
        raise ValidationFailed(f"'{param}.format.schema' needs the type 'json_schema'.", f"{param}.format.schema")
    wire: dict[str, Any] = {"format": {"type": kind}}
    if kind == "json_schema":
        wire["format"] |= {"name": form.get("name") or "answer", "schema": schema, "strict": form.get("strict")}
        wire["format"] |= {"description": form.get("description")}
    if value.get("verbosity") in ("low", "medium", "high"):
        wire["verbosity"] = value["verbosity"]
    return TextConfig(wire, None if kind == "text" else JsonFormat(schema, f"{param}.format.schema"))


def check_reasoning_options(value: Any, param: str) -> Reasoning:
    """What the object states. Raises ValidationFailed."""
    stated = check_reasoning(value, param)
    summary = value.get("summary") or value.get("generate_summary")
    return Reasoning(
        stated.is_on, stated.effort, stated.budget, summary if summary in ("auto", "concise", "detailed") else None
    )


def check_background(value: bool, param: str) -> bool:
    """false: a response is made while its request waits. Raises ValidationFailed."""
    if value:
        raise ValidationFailed(f"'{param}' is not supported: responses are made while the request waits.", param)
    return value


def check_include(value: Any, param: str) -> tuple[str, ...]:
    """The names of what to include. Raises ValidationFailed."""
    check_shape(value, INCLUDE, param)
    return tuple(value)


def check_metadata(value: Any, param: str) -> dict[str, str]:
    """Texts by name. Raises ValidationFailed."""
    for name, text in value.items():
        if not isinstance(text, str):
            raise invalid(f"{param}.{name[:64]}", text, "a string")
    return dict(value)


def check_stream_options(value: Any, param: str) -> dict[str, bool]:
    """The options, which change nothing. Raises ValidationFailed."""
    check_shape(value, STREAM_OPTIONS, param)
    return dict(value)


class ResponseRequest(ThinkingRequest, SamplingRequest):
    """POST /v1/responses."""

    __unsupported__: ClassVar = {
        "conversation": "Send the items, or 'previous_response_id'.",
        "moderation": "Nothing is moderated here.",
        "prompt": "Prompts are not kept here; send 'instructions' and 'input'.",
    }
    __no_effect__: ClassVar = {
        **NO_EFFECT,
        "access_programs": "there are none",
        "background_options": "they need 'background'",
        "image": "images are not made here",
        "max_tool_calls": "it limits OpenAI's own tools",
    }

    input: tuple[InputItem, ...] = Parameter(
        object, "What to answer: text, or a list of items.", default=(), check=check_input, shape=INPUT
    )
    instructions: str | None = Parameter(str, "The system message. It is not carried over to later responses.")
    previous_response_id: str | None = Parameter(str, "A response whose conversation is continued.")
    max_output_tokens: int | None = Parameter(
        int, "Most tokens to generate, reasoning included; -1 is no limit.", check=check_limit, shape=TOKEN_LIMIT
    )
    tools: ToolSet = Parameter(
        object,
        "Functions, custom tools and namespaces of them; other tools are left out.",
        default=ToolSet(),
        check=check_tools,
        shape=TOOLS,
    )
    tool_choice: Choice = Parameter(
        object,
        "Whether tools are called: none, auto, required, the one named, or only the allowed ones.",
        default=Choice(),
        check=check_tool_choice,
        shape=CHOICE,
    )
    parallel_tool_calls: bool = Parameter(bool, "Whether one answer may call several tools.", default=True)
    text: TextConfig = Parameter(
        object,
        "The form of the text: format may be text, json_object, or a json_schema, which is enforced.",
        default=TextConfig(),
        check=check_text,
        shape=TEXT,
    )
    reasoning: Reasoning | None = Parameter(
        object,
        "effort: as reasoning_effort. summary: accepted; reasoning comes whole, as the summary.",
        check=check_reasoning_options,
        shape=REASONING,
    )
    thinking_budget: int | None = Parameter(int, "Most tokens of reasoning; then it is closed. -1 is no limit.", ge=-1)
    top_logprobs: int | None = Parameter(
        int, "How many of the likeliest tokens to tell at each position.", ge=0, le=MAX_TOP_LOGPROBS
    )
    include: tuple[str, ...] = Parameter(
        object, f"{LOGPROBS} adds log-probabilities.", default=(), check=check_include, shape=INCLUDE
    )
    truncation: Literal["auto", "disabled"] = Parameter(
        str,
        "auto: the oldest items are left out where the input is longer than the context.",
        default="disabled",
        enum=["auto", "disabled"],
    )
    store: bool = Parameter(bool, "Keep the response, to be retrieved or continued.", default=True)
    stream: bool = Parameter(bool, "Send the response as it is made, as server-sent events.", default=False)
    stream_options: dict[str, bool] = Parameter(
        object, "Accepted without effect.", default={}, check=check_stream_options, shape=STREAM_OPTIONS
    )
    background: bool = Parameter(bool, "Only false.", default=False, check=check_background)
    keep_alive: float | None = keep_alive_parameter()
    metadata: dict[str, str] = Parameter(
        dict, "Texts by name, given back.", default={}, check=check_metadata, shape=METADATA
    )
    user: str | None = Parameter(str, "Accepted without effect.")
    service_tier: str | None = Parameter(str, "Accepted without effect.")
    safety_identifier: str | None = Parameter(str, "Accepted without effect.")
    prompt_cache_key: str | None = Parameter(str, "Accepted without effect.")

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None where none is stated."""
        return stated_limit(self.max_output_tokens)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell; 0 for the chosen ones alone, None for no log-probabilities."""
        if not self.top_logprobs and LOGPROBS not in self.include:
            return None
        return self.top_logprobs or 0

    @property
    def named_switches(self) -> dict[str, Thinking]:
        """What the request states about thinking, by the name of each parameter."""
        return super().named_switches | {"thinking_budget": of_budget(self.thinking_budget)}

    def check_together(self) -> None:
        """Refuse to force a tool that is not there, and a request for nothing."""
        super().check_together()
        self.tool_choice.check_against(self.tools.tools)
        if not self.input and not self.previous_response_id:
            raise ValidationFailed("There is no 'input', and no 'previous_response_id'.", "input")
