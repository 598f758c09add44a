"""Requests with messages: a chat completion, and the prompt that it is made from."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mlxserver.api.openai.generation import GeneratingRequest, ModelRequest
from mlxserver.api.openai.messages import SHAPE as MESSAGES
from mlxserver.api.openai.messages import check_messages
from mlxserver.api.openai.response_format import FORMAT, check_response_format
from mlxserver.api.openai.tools import CHOICE, TOOLS, check_tool_choice, check_tools
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid
from mlxserver.api.schema.validators import check_modalities
from mlxserver.engine.conversation import Message, Tool

EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max"]
MAX_TOP_LOGPROBS = 20

ReasoningFormat = Literal["reasoning_content", "reasoning", "inline"]


class PromptRequest(ModelRequest):
    """How a conversation becomes a prompt."""

    tools: tuple[Tool, ...] = Parameter(
        object, "Functions that the model may call.", default=(), check=check_tools, shape=TOOLS
    )
    reasoning_effort: str | None = Parameter(
        str, "How much to think, given to the chat template; none turns thinking off.", enum=EFFORTS
    )
    chat_template_kwargs: dict[str, Any] = Parameter(
        dict, "Variables of the chat template, such as enable_thinking.", default={}
    )
    continue_final_message: bool = Parameter(
        bool, "Go on with the last message, which is the assistant's, instead of answering it.", default=False
    )

    def check_prefill(self, messages: tuple[Message, ...] | None) -> None:
        """Refuse to continue what is no answer. Raises ValidationFailed."""
        if self.continue_final_message and (not messages or messages[-1].role != "assistant"):
            message = "'continue_final_message' needs an assistant message as the last one."
            raise ValidationFailed(message, "continue_final_message")


class ChatPromptRequest(PromptRequest):
    """A conversation to answer."""

    messages: tuple[Message, ...] = Parameter(
        object, "The conversation so far.", required=True, check=check_messages, shape=MESSAGES
    )

    def check_together(self) -> None:
        """Refuse to continue what is no answer."""
        super().check_together()
        self.check_prefill(self.messages)


class ApplyTemplateRequest(ChatPromptRequest):
    """POST /apply-template."""


class TokenizeRequest(PromptRequest):
    """POST /tokenize."""

    prompt: str | None = Parameter(str, "Text; special tokens in it count. Either this or messages.")
    messages: tuple[Message, ...] | None = Parameter(
        object, "A conversation, set in the model's chat template.", check=check_messages, shape=MESSAGES
    )

    def check_together(self) -> None:
        """Refuse both of prompt and messages, and neither."""
        if (self.prompt is None) == (self.messages is None):
            raise ValidationFailed("Expected one of 'prompt' and 'messages'.", "prompt")
        self.check_prefill(self.messages)


class ChatCompletionRequest(ChatPromptRequest, GeneratingRequest):
    """POST /v1/chat/completions."""

    __unsupported__: ClassVar = {
        "audio": "Text is all that these models make.",
        "function_call": "It is the old name of 'tool_choice'.",
        "functions": "It is the old name of 'tools'.",
        "moderation": "Nothing is moderated here.",
        "prediction": "Answers are not predicted here.",
        "verbosity": "Ask for it in a system message.",
        "web_search_options": "Nothing is searched here; offer a tool.",
    }

    max_completion_tokens: int | None = Parameter(int, "Another name of max_tokens.", ge=1)
    modalities: list[str] | None = Parameter(
        object,
        "Text, and nothing else.",
        check=check_modalities,
        shape={"type": "array", "items": {"const": "text"}, "minItems": 1, "maxItems": 1},
    )
    logprobs: bool = Parameter(bool, "Tell each token of the content with its log-probability.", default=False)
    top_logprobs: int | None = Parameter(
        int, "How many of the likeliest tokens to tell at each position.", ge=0, le=MAX_TOP_LOGPROBS
    )
    response_format: dict[str, Any] | None = Parameter(
        object, "The form of the answer; a JSON schema is enforced.", check=check_response_format, shape=FORMAT
    )
    tool_choice: tuple[str, str | None] = Parameter(
        object,
        "Whether tools are called: none, auto, required, or the one named. The last two are enforced.",
        default=("auto", None),
        check=check_tool_choice,
        shape=CHOICE,
    )
    parallel_tool_calls: bool = Parameter(bool, "Whether one answer may call several tools.", default=True)
    thinking_budget: int | None = Parameter(int, "Most tokens of reasoning; then it is closed.", ge=0)
    reasoning_format: ReasoningFormat | None = Parameter(
        str,
        "Where reasoning goes: a field of its own, or inline between <think> tags; by default as the server is set.",
        enum=["reasoning_content", "reasoning", "inline"],
    )

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, by whichever of its two names it was given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check_together(self) -> None:
        """Refuse two different limits, and what needs something that is not there."""
        super().check_together()
        if self.max_tokens not in (None, self.token_limit):
            raise ValidationFailed(
                f"'max_tokens' is {self.max_tokens} but 'max_completion_tokens' {self.token_limit}. Send one of them.",
                "max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValidationFailed("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        self._check_tool_choice()

    def _check_tool_choice(self) -> None:
        mode, name = self.tool_choice
        names = [tool.name for tool in self.tools]
        if mode == "function" and name not in names:
            expected = "the name of one of 'tools'" + (
                f": {', '.join(names)}" if names else ", of which there are none"
            )
            raise invalid("tool_choice", name, expected)
        if mode == "required" and not names:
            raise ValidationFailed("'tool_choice' is 'required', but there are no 'tools'.", "tool_choice")
