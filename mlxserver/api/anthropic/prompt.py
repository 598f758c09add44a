"""The part of a request that becomes its prompt, and the count of that prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mlxserver.api.anthropic.messages import MESSAGES, SYSTEM, check_messages, check_system
from mlxserver.api.anthropic.tools import CHOICE, TOOLS, Tools, check_tool_choice, check_tools
from mlxserver.api.openai.generation import ModelRequest
from mlxserver.api.openai.thinking import THINKING, Thinking, agreed, check_thinking, of_effort
from mlxserver.api.schema.json_schema import check_shape
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid
from mlxserver.engine.conversation import Message
from mlxserver.engine.requests import ChatPrompt, JsonFormat, ToolChoice

FORMAT: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"enum": ["json_schema"]}, "schema": {"type": "object"}},
    "required": ["type", "schema"],
}
OUTPUT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "effort": {"type": ["string", "null"]},
        "format": {**FORMAT, "type": ["object", "null"]},
    },
}
NO_EFFECT = {
    **dict.fromkeys(("inference_geo", "speed", "billing_policy"), "models run here, as fast as they can"),
    **dict.fromkeys(("diagnostics", "user_profile_id", "workspace_id", "betas"), "nothing of it applies here"),
    **dict.fromkeys(("fallbacks", "fallback_credit_token"), "the named model answers"),
}


def check_output(value: Any, param: str) -> dict[str, Any]:
    """What was given of "effort" and "format". Raises ValidationFailed."""
    check_shape(value, OUTPUT, param)
    output: dict[str, Any] = {"effort": of_effort(value.get("effort"))}
    if value.get("format") is not None:
        output["format"] = check_format(value["format"], f"{param}.format")
    return output


def check_format(value: Any, param: str) -> JsonFormat:
    """The format of an answer, a JSON schema. Raises ValidationFailed."""
    check_shape(value, FORMAT, param)
    return JsonFormat(value["schema"], f"{param}.schema")


class PromptRequest(ModelRequest):
    """A conversation to answer."""

    __unsupported__: ClassVar = {
        "compaction": "A conversation is never shortened here; send a shorter one.",
        "container": "Nothing is run here.",
        "mcp_servers": "No server is called from here; offer its tools.",
        "thread": "No conversation is kept here; send all of it.",
    }
    __no_effect__: ClassVar = NO_EFFECT

    messages: tuple[Message, ...] = Parameter(
        object,
        "The conversation so far. A last message of the assistant's is continued.",
        required=True,
        check=check_messages,
        shape=MESSAGES,
    )
    system: tuple[Message, ...] = Parameter(
        object, "System message, as text or as a list of text blocks.", default=(), check=check_system, shape=SYSTEM
    )
    tools: Tools = Parameter(
        object,
        "Tools that the model may call. Those that only Anthropic's servers or models know are left out.",
        default=Tools(),
        check=check_tools,
        shape=TOOLS,
    )
    tool_choice: ToolChoice = Parameter(
        object,
        "Whether tools are called: auto, any, the one tool that is named, or none. any and tool are enforced.",
        default=ToolChoice(),
        check=check_tool_choice,
        shape=CHOICE,
    )
    thinking: Thinking = Parameter(
        object,
        "The type disabled turns thinking off; budget_tokens limits it, -1 is no limit.",
        default=Thinking(),
        check=check_thinking,
        shape=THINKING,
    )
    output_config: dict[str, Any] = Parameter(
        object,
        "effort: how much to think. format: a JSON schema, which is enforced.",
        default={},
        check=check_output,
        shape=OUTPUT,
    )
    output_format: JsonFormat | None = Parameter(
        object, "An older name of output_config.format.", check=check_format, shape=FORMAT
    )

    @property
    def switches(self) -> Thinking:
        """What the request states about thinking."""
        effort = self.output_config.get("effort", Thinking())
        return agreed({"thinking": self.thinking, "output_config.effort": effort})

    @property
    def format(self) -> JsonFormat | None:
        """The format of the answer. Raises ValidationFailed if two are given."""
        if self.output_format and "format" in self.output_config:
            raise ValidationFailed("The format is in 'output_config.format' already.", "output_format")
        return self.output_format or self.output_config.get("format")

    @property
    def prompt(self) -> ChatPrompt:
        """The prompt. Tools that may not be called are not in it."""
        tools = () if self.tool_choice.mode == "none" else self.tools.offered
        conversation = (*self.system, *self.messages)
        return ChatPrompt(conversation, tools, self.switches.template_kwargs, _continues(conversation))

    def check_together(self) -> None:
        """Refuse two formats, and a choice among tools that are not there."""
        super().check_together()
        _ = self.format
        choice, names = self.tool_choice, [tool.name for tool in self.tools.offered]
        if choice.mode == "required" and not names:
            raise ValidationFailed(
                "'tool_choice' is 'any', but there are no 'tools' that can be called.", "tool_choice"
            )
        if choice.mode == "function" and choice.name not in names:
            expected = "the name of one of 'tools' that can be called: " + (", ".join(names) or "there are none")
            raise invalid("tool_choice.name", choice.name, expected)


class CountTokensRequest(PromptRequest):
    """POST /v1/messages/count_tokens."""

    __no_effect__: ClassVar = {
        **NO_EFFECT,
        **dict.fromkeys(
            ("max_tokens", "metadata", "service_tier", "stop_sequences", "stream", "temperature", "top_k", "top_p"),
            "it changes nothing in the prompt",
        ),
    }


def token_count(tokens: Sequence[int]) -> dict[str, Any]:
    """Answer to a count."""
    return {"input_tokens": len(tokens)}


def _continues(conversation: Sequence[Message]) -> bool:
    """Whether the last message is the beginning of the answer."""
    last = conversation[-1] if conversation else Message("user", ())
    return last.role == "assistant" and not last.calls and bool(last.text or last.reasoning)
