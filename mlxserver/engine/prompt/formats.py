"""Prompt formats: a conversation, text or token ids -> the prompt of a model, by its type.

Rule 1: a conversation is rendered as it is where the template of the model shows all of it; otherwise it is put right
        with the fewest changes (prompt/arrangement.py), and these are logged.
Rule 2: an earlier message is rendered the same when later ones are added, wherever the template allows it.
Rule 3: whether the prompt leaves the reasoning open is read from what the template appends for the answer, never from
        the text of the messages; only an answer that is continued shows it by itself.
Rule 4: a template without a place for tools, or for a system message, loses neither: the tools are described in the
        system message (prompt/tool_text.py), and that becomes the beginning of the user's.
Rule 5: a variable that the template does not have changes nothing (prompt/switches.py).
Rule 6: text and token ids have no conversation in them, so nothing is added but the beginning of a sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mlxserver.config.settings import ModelType
from mlxserver.engine.conversation import Message
from mlxserver.engine.errors import PromptRejected, SeesNoImages
from mlxserver.engine.output.reasoning_formats import find_format, thinking_tags
from mlxserver.engine.output.tool_formats import ToolFormat
from mlxserver.engine.prompt.arrangement import arrange, begin, split_calls
from mlxserver.engine.prompt.boundaries import Boundaries
from mlxserver.engine.prompt.chat_template import ChatTemplate
from mlxserver.engine.prompt.fill_in_middle import FillInMiddle
from mlxserver.engine.prompt.images import ImageProcessor, show_result_images
from mlxserver.engine.prompt.switches import EFFORT, THINKING
from mlxserver.engine.prompt.tool_text import describe, write_plain, write_reasoning
from mlxserver.engine.prompt.transitions import StrictTable, Table
from mlxserver.engine.prompt.turns import admit, check_text, count_lost, name_developer_system
from mlxserver.engine.requests import (
    ChatPrompt,
    FillPrompt,
    FormattedPrompt,
    Prompt,
    TextPrompt,
    TokenPrompt,
    ToolChoice,
)

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("engine")


class PromptFormat:
    """Prompt format of one type of model. `config` is the model's config.json. finds_boundaries: for checkpoints.

    images: processor of those that the model sees; None of a text model.
    """

    thinks: ClassVar[bool]

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        config: Mapping[str, Any],
        *,
        finds_boundaries: bool = False,
        images: ImageProcessor | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._images = images
        self._template = ChatTemplate(tokenizer, config, images)
        self._boundaries = Boundaries(self._template, tokenizer) if finds_boundaries else None
        self._tags = thinking_tags(tokenizer)
        self._fill_in_middle = FillInMiddle(tokenizer)

    @property
    def fills_in_middle(self) -> bool:
        """Whether the model has tokens to fill in the middle."""
        return self._fill_in_middle.marks is not None

    @property
    def tool_format(self) -> ToolFormat:
        """The format in which the model writes tool calls for these prompts."""
        return self._template.tool_format

    def format(self, prompt: Prompt, tool_choice: ToolChoice | None = None) -> FormattedPrompt:
        """The prompt as the model reads it. Tools that may not be called are not shown. Raises PromptRejected."""
        match prompt:
            case TextPrompt(text):
                return format_text(self._tokenizer, text)
            case TokenPrompt(tokens):
                return format_tokens(self._tokenizer, tokens)
            case FillPrompt(prefix, suffix):
                return self._fill_in_middle.format(prefix, suffix)
        prompt = self._with_images(prompt)
        if tool_choice and tool_choice.mode == "none":
            prompt = replace(prompt, tools=())
        variables = self._variables(prompt.template_kwargs)
        tools = tuple(sorted(prompt.tools, key=lambda tool: tool.name))  # programs send the same ones in any order
        admitted = replace(prompt, conversation=tuple(admit(prompt)), tools=tools, template_kwargs=variables)
        return self._render(*self._fit(admitted))

    def budget(self, prompt: Prompt) -> int | None:
        """Most tokens of reasoning, where the prompt limits it and the chat template can't; None for any number."""
        if not isinstance(prompt, ChatPrompt) or not self.thinks:
            return None
        # On the engine thread: what the switches do was found when the prompt was formatted.
        return self._template.switches.budget(prompt.template_kwargs)

    def _with_images(self, prompt: ChatPrompt) -> ChatPrompt:
        """The prompt with its images where a template can show them, each of them processed. Raises PromptRejected."""
        if not (images := prompt.images):
            return prompt
        if self._images is None:
            raise SeesNoImages(images[0].origin)
        self._images.begin()
        for image in images:
            self._images.process(image)
        return prompt if self._template.shows_result_images else show_result_images(prompt)

    def _variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The variables of the template. One that it does not have changes nothing, and is logged."""
        for name in given.keys() - {THINKING, EFFORT}:
            if not self._template.has_variable(name):
                log.debug("%s has no effect: the chat template has no such variable", name)
        return self._template.switches.variables(given, thinks=self.thinks)

    def _fit(self, prompt: ChatPrompt) -> tuple[ChatPrompt, str]:
        """The prompt with the fewest changes with which the template shows all of it, and its text.

        Raises PromptRejected.
        """
        best: tuple[int, ChatPrompt, str] | None = None
        refusal: PromptRejected | None = None
        for number, fitted in enumerate(self._attempts(prompt)):
            if number:
                log.debug("the chat template loses some of the messages; attempt %d puts more of them right", number)
            try:
                text = self._template.render(fitted)
            except PromptRejected as error:
                refusal = refusal or error
                continue
            lost = count_lost(prompt.conversation, text, self._tags[1])
            if not best or lost < best[0]:
                best = lost, fitted, text
            if not lost:
                break
        if best:
            return best[1:]
        raise refusal or AssertionError("there is no attempt")

    def _attempts(self, prompt: ChatPrompt) -> Iterator[ChatPrompt]:
        """The prompt as the template takes it by its transitions; in strict turns; with calls, then tools, as text."""
        is_plain = not self._template.call_style
        if prompt.tools and not is_plain and not self._template.shows_tools:
            described = describe(prompt.conversation, prompt.tools, self.tool_format)
            prompt = replace(prompt, conversation=tuple(described), tools=())
        table = self._template.transitions[bool(prompt.tools) and self.tool_format.is_native]
        messages = prompt.conversation
        if "developer" not in self._template.source or not table.takes_developer:
            messages = tuple(name_developer_system(messages))
        strict = StrictTable(self._template.has_system, is_plain or table.takes_text_beside_calls)
        if is_plain:
            yield _arranged(self._write(prompt, messages), table)
        else:
            if not table.takes_several_calls:
                messages = tuple(split_calls(messages))
            yield _arranged(replace(prompt, conversation=messages), table)
        messages = tuple(begin([message for message in name_developer_system(messages) if message.parts] or messages))
        if not is_plain:
            yield _arranged(replace(prompt, conversation=messages), strict)
            yield _arranged(replace(prompt, conversation=tuple(write_plain(messages, self.tool_format))), strict)
        yield _arranged(self._plain(prompt, messages), strict)

    def _write(self, prompt: ChatPrompt, messages: Sequence[Message]) -> ChatPrompt:
        """The prompt with these messages, and as text what the template has no place for."""
        template, tool_format = self._template, self.tool_format
        if not (tool_format.is_native and template.shows_tools):
            return self._plain(prompt, messages)
        written = write_plain(messages, tool_format, keeps_results=template.shows_results)
        return replace(prompt, conversation=tuple(written))

    def _plain(self, prompt: ChatPrompt, messages: Sequence[Message]) -> ChatPrompt:
        """The prompt with these messages, tools and calls as text."""
        if self.thinks and not self._template.shows_reasoning_beside_text:
            messages = write_reasoning(messages)
        described = describe(messages, prompt.tools, self.tool_format) if prompt.tools else messages
        return replace(prompt, conversation=tuple(write_plain(described, self.tool_format)), tools=())

    def _render(self, prompt: ChatPrompt, text: str) -> FormattedPrompt:
        if prompt.continues_answer:
            opens_thinking = self._is_reasoning(prompt.conversation[-1])
        elif opens_thinking := text.rstrip().endswith(self._tags[0]):
            appended = text.removeprefix(self._template.render(prompt, opens_answer=False))
            opens_thinking = appended.rstrip().endswith(self._tags[0])
        tokens = self._template.encode(prompt, text)
        boundaries = self._boundaries.find(prompt, text, tokens) if self._boundaries else ()
        images = prompt.images if self._images else []
        placed = self._images.place(tokens, images) if self._images and images else ()
        return FormattedPrompt(tokens, text, opens_thinking, boundaries, images=placed)

    def _is_reasoning(self, answer: Message) -> bool:
        """Whether an answer that is to go on stops inside its reasoning."""
        start, end = self._tags
        text = answer.text
        return not text or (text.lstrip().startswith(start) and end not in text)


class ThinkingFormat(PromptFormat):
    """Format of models that reason before they answer. Thinking is on unless the prompt turns it off."""

    thinks = True


class InstructionFormat(PromptFormat):
    """Format of models that answer at once. Thinking is off where the template has that switch."""

    thinks = False


def _arranged(prompt: ChatPrompt, table: Table) -> ChatPrompt:
    turns = arrange(prompt.conversation, table, continues_answer=prompt.continues_answer)
    return replace(prompt, conversation=tuple(turns))


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
    check_tokens(tokens, len(tokenizer), "prompt")
    if not tokens:
        raise PromptRejected("The prompt is empty; expected at least one token.", "prompt")
    return FormattedPrompt(tuple(tokens), tokenizer.decode(list(tokens)))


def check_tokens(tokens: Iterable[int], vocab_size: int, param: str) -> None:
    """Refuse tokens that do not exist: MLX would read or write beyond the end of an array."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise PromptRejected(f"{param}: this model has no token {token}; expected 0 to {vocab_size - 1}.", param)
