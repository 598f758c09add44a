"""Chat template of a model: conversation -> text and tokens.

Rule 1: control tokens come from the template alone. Their text in a message is encoded as plain text.
Rule 2: what a template can do, and in which forms it reads messages, is found out by trying.
Rule 3: a tokenizer belongs to one thread at a time; so does a template.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlxserver.engine.conversation import Image, Message, Reasoning, Text, Tool
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.call_families import find_format
from mlxserver.engine.output.tool_formats import PLAIN, ToolFormat
from mlxserver.engine.prompt.call_style import CALL_PROBE, CALL_WORDS, RESULT_IMAGE_PROBE, STYLES, CallStyle
from mlxserver.engine.prompt.content_form import ContentForm, find_content_form
from mlxserver.engine.prompt.images import ImageProcessor
from mlxserver.engine.prompt.reasoning_forms import ReasoningForm, find_form
from mlxserver.engine.prompt.segments import MARK, SegmentEncoder, unmarked
from mlxserver.engine.prompt.switches import Switches
from mlxserver.engine.prompt.template_call import Forms, TemplateCall, refusal
from mlxserver.engine.prompt.transitions import Transitions
from mlxserver.engine.requests import ChatPrompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

SYSTEM_WORD = "\u2042 probe \u2042"
SYSTEM_PROBE = ChatPrompt((Message("system", (Text(SYSTEM_WORD),)), Message("user", (Text("Hello"),))))


class ChatTemplate:
    """Chat template of one model. `config` is the model's config.json. images: None of a model that sees none."""

    def __init__(
        self, tokenizer: TokenizerWrapper, config: Mapping[str, Any], images: ImageProcessor | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._images = images
        self._call = TemplateCall(tokenizer, config)

    @property
    def source(self) -> str:
        """The Jinja text, all of it where a model has several; empty for a model that renders with code of its own."""
        return self._call.source

    def has_variable(self, name: str) -> bool:
        """Whether the template reads a variable. A model's own code may know any."""
        return not self.source or name in self.source

    @functools.cached_property
    def has_system(self) -> bool:
        """Whether the template renders a system message."""
        return self._shows([SYSTEM_WORD], SYSTEM_PROBE, CallStyle())

    @functools.cached_property
    def tool_format(self) -> ToolFormat:
        """The format in which the model writes calls: its own if the prompt can show tools and calls in it."""
        found = find_format(self._tokenizer, self.source)
        has_place = self._call_style and self.shows_tools
        can_write = found and found.writer and (self._call_style or self.shows_tools)
        return found if found and (has_place or can_write) else PLAIN

    @functools.cached_property
    def shows_tools(self) -> bool:
        """Whether the template shows the functions that may be called."""
        return self._shows(CALL_WORDS[:2], replace(CALL_PROBE, conversation=CALL_PROBE.conversation[:1]), CallStyle())

    @functools.cached_property
    def shows_results(self) -> bool:
        """Whether the template shows results behind calls that are written as text."""
        question, _, result = CALL_PROBE.conversation
        answer = Message("assistant", (Text("Let me see."),))
        return self._shows(CALL_WORDS[3:], ChatPrompt((question, answer, result)), CallStyle())

    @functools.cached_property
    def shows_result_images(self) -> bool:
        """Whether the template has a place for images in a result of a tool."""
        if not (self._images and self.call_style) or self._content_form.placeholder:
            return False
        try:
            text = self._call.text(RESULT_IMAGE_PROBE, self._forms(RESULT_IMAGE_PROBE, self.call_style))
        except PromptRejected:
            return False
        return CALL_WORDS[3] in text and text.count(self._images.placeholder) == 1

    @functools.cached_property
    def shows_reasoning_beside_text(self) -> bool:
        """Whether the template shows the reasoning before a call that is text, its result the user's text."""
        question = CALL_PROBE.conversation[0]
        answer = Message("assistant", (Reasoning(CALL_WORDS[0]), Text("Let me see.")))
        return self._shows(CALL_WORDS[:1], ChatPrompt((question, answer, question)), CallStyle())

    @property
    def call_style(self) -> CallStyle | None:
        """How tool calls stand in the history; None where calls or results have no place."""
        return self._call_style if self.tool_format.is_native else None

    @functools.cached_property
    def _call_style(self) -> CallStyle | None:
        probes = (CALL_PROBE, replace(CALL_PROBE, tools=()))
        words = CALL_WORDS[:1] + CALL_WORDS[2:]
        return next((style for style in STYLES if any(self._shows(words, probe, style) for probe in probes)), None)

    @functools.cached_property
    def transitions(self) -> dict[bool, Transitions]:
        """What the template takes, beside tools (True) or without any."""
        return {has_tools: Transitions(self._try_render, has_tools=has_tools) for has_tools in (False, True)}

    @functools.cached_property
    def switches(self) -> Switches:
        """What the template does with enable_thinking and reasoning_effort."""
        return Switches(self._try_render)

    @functools.cached_property
    def reasoning_form(self) -> ReasoningForm:
        """Where the template reads the reasoning of earlier answers."""

        def try_render(prompt: ChatPrompt, form: ReasoningForm) -> str | None:
            try:
                return self._call.text(prompt, self._forms(prompt, reasoning=form))
            except PromptRejected:
                return None

        return find_form(try_render)

    @functools.cached_property
    def _content_form(self) -> ContentForm:
        """How text and images of a message stand in what the template gets."""
        if not self._images:
            return ContentForm()

        def try_render(prompt: ChatPrompt, form: ContentForm) -> str | None:
            try:
                return self._call.text(prompt, self._forms(prompt, CallStyle(), content=form))
            except PromptRejected:
                return None

        return find_content_form(try_render, self._images.placeholder)

    def _forms(
        self,
        prompt: ChatPrompt,
        style: CallStyle | None = None,
        *,
        reasoning: ReasoningForm | None = None,
        content: ContentForm | None = None,
        has_whole_tools: bool | None = None,
    ) -> Forms:
        """The forms for a prompt: those that are to be tried, and otherwise those that the template reads."""
        if not reasoning and any(message.reasoning for message in prompt.conversation):
            reasoning = self.reasoning_form
        if has_whole_tools is None:
            has_whole_tools = bool(prompt.tools) and self._needs_whole_tools
        style = style or self.call_style or CallStyle()
        return Forms(style, reasoning, content or self._content_form, has_whole_tools)

    def _try_render(self, prompt: ChatPrompt, opens_answer: bool) -> str | None:
        try:
            return self.render(prompt, opens_answer=opens_answer)
        except PromptRejected:
            return None

    def _shows(self, words: Sequence[str], prompt: ChatPrompt, style: CallStyle) -> bool:
        try:
            text = self._call.text(prompt, self._forms(prompt, style))
        except PromptRejected:
            return False
        return all(word in text for word in words)

    def render(self, prompt: ChatPrompt, *, opens_answer: bool = True) -> str:
        """The prompt as text, up to the beginning of the answer or not. Raises PromptRejected."""
        if self._images and (images := prompt.images):
            return unmarked(self._render_images(self._images, images, prompt, opens_answer=opens_answer))
        return self._call.text(prompt, self._forms(prompt), opens_answer=opens_answer)

    def encode(self, prompt: ChatPrompt, text: str) -> tuple[int, ...]:
        """The prompt as token ids, up to the beginning of the answer. text: it rendered. Raises PromptRejected."""
        if self._images and (images := prompt.images):
            return self._encode(self._render_images(self._images, images, prompt))
        if not self.source:  # the model's own code renders text only
            return self._encoder.encode(text)
        if not self._encoder.marks_control_tokens:
            return self._call.tokens(prompt, self._forms(prompt))
        return self._encode(self._render_marked(prompt) or text)

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            return self._encoder.encode(text)
        except ValueError as error:  # a control token can't be encoded as text
            raise refusal(error) from error

    def _render_marked(self, prompt: ChatPrompt, *, opens_answer: bool = True) -> str | None:
        """The prompt with the control tokens marked that stand in its messages; None if there are none."""
        messages, options = self._call.arguments(prompt, self._forms(prompt), opens_answer=opens_answer)
        given = [messages, options.get("tools"), dict(prompt.template_kwargs)]
        messages, tools, variables = marked = self._encoder.mark(given, options.get("chat_template"))
        if marked == given:
            return None
        options |= variables | ({"tools": tools} if tools else {})
        return str(self._call.call(messages, {**options, "tokenize": False}))

    def _render_images(
        self, processor: ImageProcessor, images: Sequence[Image], prompt: ChatPrompt, *, opens_answer: bool = True
    ) -> str:
        """The prompt with what stands for its images, and with control tokens marked. Raises PromptRejected."""
        can_mark = bool(self.source) and self._encoder.marks_control_tokens
        text = self._render_marked(prompt, opens_answer=opens_answer) if can_mark else None
        if text is None:
            text = self._call.text(prompt, self._forms(prompt), opens_answer=opens_answer)
        return processor.expand(text, images, MARK if can_mark else "")

    @functools.cached_property
    def _encoder(self) -> SegmentEncoder:
        return SegmentEncoder(self._tokenizer, self.source, self._images.placeholder if self._images else "")

    @functools.cached_property
    def _needs_whole_tools(self) -> bool:
        """Whether the template shows no function without a description or parameters."""
        shows = [self._shows_tool(is_whole=is_whole) for is_whole in (False, True)]
        return shows == [False, True]

    def _shows_tool(self, *, is_whole: bool) -> bool:
        prompt = ChatPrompt((Message("user", (Text("Hello"),)),), (Tool(CALL_WORDS[0]),))
        try:
            forms = self._forms(prompt, CallStyle(), has_whole_tools=is_whole)
            return CALL_WORDS[0] in self._call.text(prompt, forms)
        except PromptRejected:
            return False
