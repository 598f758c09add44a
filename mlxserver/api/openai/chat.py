"""Chat completions: the request, the prompt that its messages become, and the dialect."""

from __future__ import annotations

from typing import ClassVar

from mlxserver.api.dialect import Call
from mlxserver.api.openai.encoders import ChatEncoder
from mlxserver.api.openai.generation import (
    NO_EFFECT,
    TOKEN_LIMIT,
    GeneratingRequest,
    check_limit,
)
from mlxserver.api.openai.messages import SHAPE as MESSAGES
from mlxserver.api.openai.messages import check_messages
from mlxserver.api.openai.response_format import FORMAT, check_response_format
from mlxserver.api.openai.thinking import Thinking, ThinkingRequest, of_budget
from mlxserver.api.openai.tools import CHOICE, TOOLS, check_tool_choice, check_tools
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid, parse
from mlxserver.api.schema.validators import check_modalities
from mlxserver.config.settings import ReasoningFormat, Settings
from mlxserver.engine.conversation import Message, Tool
from mlxserver.engine.requests import ChatPrompt, GenerationRequest, JsonFormat, ToolChoice

MAX_TOP_LOGPROBS = 20


class PromptRequest(ThinkingRequest):
    """How a conversation becomes a prompt."""

    tools: tuple[Tool, ...] = Parameter(
        object, "Functions that the model may call.", default=(), check=check_tools, shape=TOOLS
    )
    continue_final_message: bool = Parameter(
        bool, "Go on with the last message, which is the assistant's, instead of answering it.", default=False
    )

    def chat_prompt(self, messages: tuple[Message, ...]) -> ChatPrompt:
        """The prompt of these messages."""
        return ChatPrompt(messages, self.tools, self.template_kwargs, self.continue_final_message)

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


class ChatCompletionRequest(ChatPromptRequest, GeneratingRequest):
    """POST /v1/chat/completions."""

    __unsupported__: ClassVar = {
        "audio": "Text is all that these models make.",
        "function_call": "It is the old name of 'tool_choice'.",
        "functions": "It is the old name of 'tools'.",
        "moderation": "Nothing is moderated here.",
        "web_search_options": "Nothing is searched here; offer a tool.",
    }
    __no_effect__: ClassVar = {**NO_EFFECT, "prediction": "it would change the speed of an answer, not its text"}

    max_completion_tokens: int | None = Parameter(
        int, "Another name of max_tokens.", check=check_limit, shape=TOKEN_LIMIT
    )
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
    response_format: JsonFormat | None = Parameter(
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
    thinking_budget: int | None = Parameter(int, "Most tokens of reasoning; then it is closed. -1 is no limit.", ge=-1)
    reasoning_format: ReasoningFormat | None = Parameter(
        str,
        "Where reasoning goes: a field of its own, or inline between <think> tags; by default as the server is set.",
        enum=["reasoning_content", "reasoning", "inline"],
    )

    @property
    def token_limits(self) -> dict[str, int | None]:
        """Most tokens to generate, by each name that such a limit has."""
        return super().token_limits | {"max_completion_tokens": self.max_completion_tokens}

    @property
    def named_switches(self) -> dict[str, Thinking]:
        """What the request states about thinking, by the name of each parameter."""
        return super().named_switches | {"thinking_budget": of_budget(self.thinking_budget)}

    def check_together(self) -> None:
        """Refuse what needs something that is not there."""
        super().check_together()
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


class ChatDialect:
    """Dialect of POST /v1/chat/completions."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)
        self._reasoning_format = settings.reasoning_format

    def parse(self, body: bytes) -> Call:
        """Read a chat completion. Raises ValidationFailed."""
        request = parse(ChatCompletionRequest, body, self._limits)
        reasoning_format = request.reasoning_format or self._reasoning_format
        return Call(
            request.model,
            [_generation_request(request)],
            ChatEncoder(request, reasoning_format, has_logprobs=request.logprobs),
            streams=request.stream,
            idle_timeout=request.keep_alive,
            ignored=request.ignored,
        )


def _generation_request(request: ChatCompletionRequest) -> GenerationRequest:
    mode, name = request.tool_choice
    return GenerationRequest(
        request.chat_prompt(request.messages),
        request.sampling,
        request.token_limit,
        request.stop,
        n=request.n,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        top_logprobs=request.top_logprobs or 0 if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        format=request.response_format,
        tool_choice=ToolChoice(mode, name, request.parallel_tool_calls),  # type: ignore[arg-type]
        thinking_budget=request.switches.budget,
    )
