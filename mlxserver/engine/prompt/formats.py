"""Prompt formats: a conversation, text or token ids -> the prompt of a model, by its type.

Rule 1: a thinking model's chat template is used as it is.
Rule 2: an instruction model gets strict turns (prompt/turns.py), whatever its template would let pass.
Rule 3: whether the prompt leaves the reasoning open is read from what the template appends for the answer, never from
        the text of the messages; only an answer that is continued shows it by itself.
Rule 4: a template without a place for tools, or for a system message, loses neither: the tools are described in the
        system message (prompt/tool_text.py), and that becomes the beginning of the user's.
Rule 5: a variable that the template does not have is refused, except one that changes nothing.
Rule 6: text and token ids have no conversation in them, so nothing is added but the beginning of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mlxserver.config.settings import ModelType
from mlxserver.engine.conversation import Message
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.reasoning_formats import find_format, thinking_tags
from mlxserver.engine.output.tool_formats import PLAIN, ToolFormat, native_format
from mlxserver.engine.prompt.chat_template import ChatTemplate
from mlxserver.engine.prompt.tool_text import describe, write_plain
from mlxserver.engine.prompt.turns import admit, alternate, check_text, fold_system, name_developer_system
from mlxserver.engine.requests import ChatPrompt, FormattedPrompt, Prompt, TextPrompt, TokenPrompt, ToolChoice

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class PromptFormat:
    """Prompt format of one type of model. `config` is the model's config.json."""

    thinks: ClassVar[bool]

    def __init__(self, tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, config)
        self._tags = thinking_tags(tokenizer)

    @property
    def tool_format(self) -> ToolFormat:
        """The format in which the model writes tool calls for these prompts."""
        return native_format(self._tokenizer) if self._template.call_style else PLAIN

    def format(self, prompt: Prompt, tool_choice: ToolChoice | None = None) -> FormattedPrompt:
        """The prompt as the model reads it. Tools that may not be called are not shown. Raises PromptRejected."""
        match prompt:
            case TextPrompt(text):
                return format_text(self._tokenizer, text)
            case TokenPrompt(tokens):
                return format_tokens(self._tokenizer, tokens)
        if tool_choice and tool_choice.mode == "none":
            prompt = replace(prompt, tools=())
        arranged = self._arrange(prompt)
        self._check_variables(prompt.template_kwargs)
        return self._render(
            replace(arranged, template_kwargs={"enable_thinking": self.thinks, **prompt.template_kwargs})
        )

    def must_not_think(self, prompt: Prompt) -> bool:
        """Whether the prompt switches the reasoning off, and the template has no such switch."""
        is_off = isinstance(prompt, ChatPrompt) and prompt.template_kwargs.get("enable_thinking") is False
        return is_off and self.thinks and not self._template.has_variable("enable_thinking")

    def _arrange(self, prompt: ChatPrompt) -> ChatPrompt:
        """The prompt with nothing in it that the template has no place for. Raises PromptRejected."""
        turns, tools = self._order(admit(prompt), prompt), prompt.tools
        if not self._template.call_style:
            turns, tools = write_plain(describe(turns, tools) if tools else turns), ()
        if not self._template.has_system:
            turns = fold_system(turns)
        return replace(prompt, conversation=tuple(turns), tools=tools)

    def _order(self, messages: list[Message], prompt: ChatPrompt) -> list[Message]:
        """The messages in the order in which the template gets them. Raises PromptRejected."""
        raise NotImplementedError

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        """Refuse what would have no effect."""
        if variables.get("enable_thinking") and not self.thinks:
            raise PromptRejected(
                "This model answers without thinking: it can't be switched on.", "prompt.template_kwargs"
            )
        for name in variables:
            if name != "enable_thinking" and not self._template.has_variable(name):
                is_effort = name == "reasoning_effort"
                hint = " Use thinking_budget." if is_effort and self.thinks else ""
                param = "prompt.template_kwargs" + (f".{name}" if is_effort else "")
                raise PromptRejected(f"The chat template of this model has no {name}.{hint}", param)

    def _render(self, prompt: ChatPrompt) -> FormattedPrompt:
        text = self._template.render(prompt)
        if prompt.continues_answer:
            opens_thinking = self._is_reasoning(prompt.conversation[-1])
        elif opens_thinking := text.rstrip().endswith(self._tags[0]):
            appended = text.removeprefix(self._template.render(prompt, opens_answer=False))
            opens_thinking = appended.rstrip().endswith(self._tags[0])
        return FormattedPrompt(self._template.encode(prompt), text, opens_thinking)

    def _is_reasoning(self, answer: Message) -> bool:
        """Whether an answer that is to go on stops inside its reasoning."""
        start, end = self._tags
        text = answer.text
        return not text or (text.lstrip().startswith(start) and end not in text)


class ThinkingFormat(PromptFormat):
    """Format of models that reason before they answer. enable_thinking is true unless the prompt sets it."""

    thinks = True

    def _order(self, messages: list[Message], prompt: ChatPrompt) -> list[Message]:
        """The messages as they are; "developer" is "system" where the template does not have that role."""
        return messages if "developer" in self._template.source else name_developer_system(messages)


class InstructionFormat(PromptFormat):
    """Format of models that answer at once. Thinking is off where the template has that switch."""

    thinks = False

    def _order(self, messages: list[Message], prompt: ChatPrompt) -> list[Message]:
        return alternate(messages, continues_answer=prompt.continues_answer)


FORMATS: dict[ModelType, type[PromptFormat]] = {"thinking": ThinkingFormat, "instruction": InstructionFormat}


def find_type(tokenizer: TokenizerWrapper) -> ModelType:
    """The type of a model: thinking if its tokenizer or chat template has marks of reasoning."""
    return "thinking" if find_format(tokenizer) else "instruction"


def format_text(tokenizer: TokenizerWrapper, text: str) -> FormattedPrompt:
    """Prompt of text as it is, with its special tokens, behind a beginning of sequence where the tokenizer sets one.

    Raises PromptRejected.
    """
    check_text(text, "prompt")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    first = tokenizer.encode("")[:1]
    if first == [tokenizer.bos_token_id] != tokens[:1]:
        tokens = first + tokens
    if not tokens:
        raise PromptRejected("The prompt is empty; expected some text.", "prompt")
    return FormattedPrompt(tuple(tokens), text)


def format_tokens(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> FormattedPrompt:
    """Prompt of token ids as they are. Raises PromptRejected."""
    last = len(tokenizer) - 1
    for token in tokens:
        if not 0 <= token <= last:
            raise PromptRejected(f"prompt: this model has no token {token}; expected 0 to {last}.", "prompt")
    if not tokens:
        raise PromptRejected("The prompt is empty; expected at least one token.", "prompt")
    return FormattedPrompt(tuple(tokens), tokenizer.decode(list(tokens)))
