"""Call of a chat template: a conversation in the forms that the template reads -> text or tokens.

Rule 1: the template is the model's own. Where it has several by name, calls and tools get "tool_use".
Rule 2: whatever a template raises is a PromptRejected with the template's message.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from mlxserver.engine.conversation import Message, Tool
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.prompt.call_style import CallStyle
from mlxserver.engine.prompt.content_form import ContentForm
from mlxserver.engine.prompt.reasoning_forms import ReasoningForm
from mlxserver.engine.prompt.sandbox import look_up_once
from mlxserver.engine.prompt.substitute import substitute
from mlxserver.engine.requests import ChatPrompt
from mlxserver.engine.template_failures import TEMPLATE_FAILURES

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"}


@dataclass(frozen=True, slots=True)
class Forms:
    """Forms of what a template reads: calls, reasoning (None: there is none), content, and tools.

    has_whole_tools: every function has a description and parameters.
    """

    calls: CallStyle
    reasoning: ReasoningForm | None
    content: ContentForm
    has_whole_tools: bool

    def message(self, message: Message) -> dict[str, Any]:
        """A message as the template reads it. Raises PromptRejected."""
        written = self.calls.message(message)
        written["content"] = self.content.content(message, written["content"])
        return self.reasoning.put(written, message.reasoning) if self.reasoning and message.reasoning else written

    def tools(self, tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """Functions as the template reads them."""
        functions = [_whole(tool.function) if self.has_whole_tools else tool.function for tool in tools]
        return [{"type": "function", "function": function} for function in functions]


class TemplateCall:
    """Chat template of one tokenizer. `config` is the model's config.json."""

    def __init__(self, tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._substitute = substitute(tokenizer, config)

    @property
    def source(self) -> str:
        """The Jinja text, all of it where a model has several; empty for a model that renders with code of its own."""
        own = self._tokenizer.chat_template
        return self._substitute or ("\n".join(own.values()) if isinstance(own, dict) else own or "")

    def text(self, prompt: ChatPrompt, forms: Forms, *, opens_answer: bool = True) -> str:
        """The prompt as text, up to the beginning of the answer or not. Raises PromptRejected."""
        messages, options = self.arguments(prompt, forms, opens_answer=opens_answer)
        return str(self.call(messages, {**options, "tokenize": False}))

    def tokens(self, prompt: ChatPrompt, forms: Forms) -> tuple[int, ...]:
        """The prompt as token ids, up to the beginning of the answer. Raises PromptRejected."""
        messages, options = self.arguments(prompt, forms)
        return tuple(self.call(messages, {**options, "tokenize": True, "sanitize_control_tokens": True}))

    def arguments(
        self, prompt: ChatPrompt, forms: Forms, *, opens_answer: bool = True
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Messages and options for the tokenizer's apply_chat_template(). Raises PromptRejected."""
        if reserved := _RESERVED.intersection(prompt.template_kwargs):
            names = ", ".join(sorted(reserved))
            raise PromptRejected(f"The variables of the chat template can't set {names}.", "prompt.template_kwargs")
        options: dict[str, Any] = {}
        if prompt.continues_answer:
            field = "content" if prompt.conversation[-1].text or not forms.reasoning else forms.reasoning.field
            options["continue_final_message"] = field
        else:
            options["add_generation_prompt"] = opens_answer
        if prompt.tools:
            options["tools"] = forms.tools(prompt.tools)
        if template := self._substitute or self._named(prompt):
            options["chat_template"] = template
        return [forms.message(message) for message in prompt.conversation], {**options, **prompt.template_kwargs}

    def call(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Any:
        """What the tokenizer makes of messages and options, as arguments() gives them. Raises PromptRejected."""
        try:
            if isinstance(source := options.get("chat_template") or self._tokenizer.chat_template, str):
                look_up_once(source)
            return self._tokenizer.apply_chat_template(messages, **options)
        except TEMPLATE_FAILURES as error:
            if "tools" not in options:  # some templates go through their tools without asking whether there are any
                with contextlib.suppress(*TEMPLATE_FAILURES):
                    return self._tokenizer.apply_chat_template(messages, **options, tools=[])
            raise refusal(error) from error

    def _named(self, prompt: ChatPrompt) -> str | None:
        """The template for this prompt, of a model that has several by name."""
        templates = self._tokenizer.chat_template
        if not isinstance(templates, dict):
            return None
        has_calls = any(message.calls or message.result for message in prompt.conversation)
        name = "tool_use" if prompt.tools or has_calls else "default"
        return str(templates.get(name) or templates.get("default") or next(iter(templates.values())))


def refusal(error: Exception) -> PromptRejected:
    """The error of a prompt that a template can't render."""
    return PromptRejected(f"The chat template of this model refuses the messages: {error}", "prompt.conversation")


def _whole(function: dict[str, Any]) -> dict[str, Any]:
    """A function with all that a template may ask for."""
    parameters = {"type": "object", "properties": {}, **function.get("parameters", {})}
    return {"description": "", **function, "parameters": parameters}
