"""Messages -> prompt, by the type of the model.

Rule 1: a thinking model's chat template is used as it is.
Rule 2: an instruction model gets strict turns (engine/messages.py), whatever its template would let pass.
Rule 3: whether the prompt leaves the reasoning open is read from what the template appends for the answer, never from
        what the messages say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from engine.config import ModelType
from engine.messages import Message, admit, alternate, name_developer_system
from engine.template import ChatTemplate
from engine.types import ChatPrompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

THINKING_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True, slots=True)
class FormattedPrompt:
    """A prompt as the model reads it. opens_thinking: it ends inside the reasoning, of which only the end will come."""

    tokens: tuple[int, ...]
    text: str
    opens_thinking: bool


class PromptFormat(Protocol):
    """How one type of model is spoken to."""

    def __init__(self, tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> None: ...

    def format(self, prompt: ChatPrompt) -> FormattedPrompt:
        """The prompt in the model's own words. Raises PromptRejected."""


class ThinkingFormat:
    """Models that reason before they answer."""

    def __init__(self, tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> None:
        self._template = ChatTemplate(tokenizer, config)
        self._start_tag = thinking_tags(tokenizer)[0]

    def format(self, prompt: ChatPrompt) -> FormattedPrompt:
        """The messages as they are; "developer" is "system" where the template does not know it.

        The template is told enable_thinking unless the prompt says otherwise. Raises PromptRejected.
        """
        messages = admit(prompt, has_tools=self._template.has_tools)
        if "developer" not in self._template.source:
            messages = name_developer_system(messages)
        return _set(self._template, messages, _default(prompt, enable_thinking=True), self._start_tag)


class InstructionFormat:
    """Models that answer at once."""

    def __init__(self, tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> None:
        self._template = ChatTemplate(tokenizer, config)
        self._start_tag = thinking_tags(tokenizer)[0]

    def format(self, prompt: ChatPrompt) -> FormattedPrompt:
        """The messages as strict turns, and thinking off where the template has that switch. Raises PromptRejected."""
        messages = admit(prompt, has_tools=self._template.has_tools)
        turns = alternate(messages, has_system=self._template.has_system)
        return _set(self._template, turns, _default(prompt, enable_thinking=False), self._start_tag)


FORMATS: dict[ModelType, type[PromptFormat]] = {"thinking": ThinkingFormat, "instruction": InstructionFormat}


def find_type(tokenizer: TokenizerWrapper) -> ModelType:
    """Thinking if the tokenizer or its chat template knows thinking tags."""
    return "thinking" if _find_tags(tokenizer) else "instruction"


def thinking_tags(tokenizer: TokenizerWrapper) -> tuple[str, str]:
    """The tags round a model's reasoning; <think> and </think> for a model that names none."""
    return _find_tags(tokenizer) or THINKING_TAGS[0]


def _find_tags(tokenizer: TokenizerWrapper) -> tuple[str, str] | None:
    if tokenizer.has_thinking:
        return tokenizer.think_start, tokenizer.think_end
    source = ChatTemplate(tokenizer, {}).source
    return next((tags for tags in THINKING_TAGS if any(tag in source for tag in tags)), None)


def _default(prompt: ChatPrompt, **template_kwargs: Any) -> ChatPrompt:
    return replace(prompt, template_kwargs={**template_kwargs, **prompt.template_kwargs})


def _set(template: ChatTemplate, messages: list[Message], prompt: ChatPrompt, start_tag: str) -> FormattedPrompt:
    text = template.render(messages, prompt)
    opens_thinking = text.rstrip().endswith(start_tag)
    if opens_thinking:
        closed = template.render(messages, prompt, opens_answer=False)
        appended = text.removeprefix(closed)
        opens_thinking = appended.rstrip().endswith(start_tag)
    return FormattedPrompt(template.encode(messages, prompt), text, opens_thinking)
