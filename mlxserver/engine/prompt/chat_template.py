"""Chat template of a model: conversation -> text and tokens.

Rule 1: the template is the model's own. Without one, a Mistral gets the [INST] format, and any other model a template
        that refuses every conversation.
Rule 2: whatever a template raises is a PromptRejected with the template's message.
Rule 3: control tokens come from the template alone. Their text in a message is encoded as plain text.
Rule 4: what a template can do is found out by trying.
Rule 5: a tokenizer belongs to one thread at a time; so does a template.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mlxserver.engine.conversation import Message, Text, Tool, ToolCall, ToolResult
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.call_families import find_format
from mlxserver.engine.output.tool_formats import ToolFormat
from mlxserver.engine.prompt.tool_text import write_json
from mlxserver.engine.requests import ChatPrompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

RENDERING_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"}

NO_TEMPLATE = "{{ raise_exception('the model has no chat template, and is no Mistral') }}"

INST = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- 'SPREAD[INST]GAP' + message.content + 'SPREAD[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- 'GAP' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('the [INST] format has no role ' + message.role) }}
    {%- endif %}
{%- endfor %}"""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """Form of past calls that a template expects: arguments as JSON text, ids of nine letters and digits."""

    has_text_arguments: bool = False
    has_short_ids: bool = False

    def message(self, message: Message) -> dict[str, Any]:
        """A message as a template reads it. Raises PromptRejected."""
        fields: dict[str, Any] = {"role": message.role, "content": message.text}
        if name := message.name:
            fields["name"] = name
        if message.role == "assistant":
            if reasoning := message.reasoning:
                fields["reasoning_content"] = reasoning
            if calls := message.calls:
                fields["tool_calls"] = [self._call(call) for call in calls]
        elif message.role == "tool" and (result := message.result):
            fields["tool_call_id"] = self._id(result.call_id)
            if result.name:
                fields["name"] = result.name
        return fields

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments = write_json(call.arguments) if self.has_text_arguments else call.arguments
        return {"type": "function", "id": self._id(call.id), "function": {"name": call.name, "arguments": arguments}}

    def _id(self, call_id: str) -> str:
        if not self.has_short_ids:
            return call_id
        return hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()[:9]


STYLES = tuple(CallStyle(text, short) for text in (False, True) for short in (False, True))

SYSTEM_WORD = "\u2042 probe \u2042"
SYSTEM_PROBE = ChatPrompt((Message("system", (Text(SYSTEM_WORD),)), Message("user", (Text("Hello"),))))
CALL_WORDS = ("probe_name", "probe_description", "probe_value", "probe_result")
CALL_PROBE = ChatPrompt(
    (
        Message("user", (Text("Hello"),)),
        Message("assistant", (ToolCall("call_0123456789abcdef", "probe_name", {"probe_key": "probe_value"}),)),
        Message("tool", (ToolResult("call_0123456789abcdef", "probe_result", "probe_name"),)),
    ),
    (Tool("probe_name", "probe_description", {"type": "object", "properties": {"probe_key": {"type": "string"}}}),),
)


class ChatTemplate:
    """Chat template of one model. `config` is the model's config.json."""

    def __init__(self, tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._substitute = None if tokenizer.has_chat_template else _substitute(tokenizer, config)

    @property
    def source(self) -> str:
        """The Jinja text, all of it where a model has several; empty for a model that renders with code of its own."""
        own = self._tokenizer.chat_template
        return self._substitute or ("\n".join(own.values()) if isinstance(own, dict) else own or "")

    def has_variable(self, name: str) -> bool:
        """Whether the template reads a variable. A model's own code may know any."""
        return not self.source or name in self.source

    @functools.cached_property
    def has_system(self) -> bool:
        """Whether the template renders a system message."""
        return self._shows([SYSTEM_WORD], SYSTEM_PROBE, CallStyle())

    @functools.cached_property
    def call_format(self) -> ToolFormat | None:
        """The format in which the model writes calls; None where it has none of its own."""
        return find_format(self._tokenizer, self.source)

    @functools.cached_property
    def call_style(self) -> CallStyle | None:
        """How tool calls stand in the history; None where tools, calls or results have no place."""
        if self.call_format is None:
            return None
        return next((style for style in STYLES if self._shows(CALL_WORDS, CALL_PROBE, style)), None)

    def _shows(self, words: Sequence[str], prompt: ChatPrompt, style: CallStyle) -> bool:
        try:
            text = str(self._apply(prompt, style, tokenize=False))
        except PromptRejected:
            return False
        return all(word in text for word in words)

    def render(self, prompt: ChatPrompt, *, opens_answer: bool = True) -> str:
        """The prompt as text, up to the beginning of the answer or not. Raises PromptRejected."""
        return str(self._apply(prompt, self.call_style or CallStyle(), opens_answer=opens_answer, tokenize=False))

    def encode(self, prompt: ChatPrompt) -> tuple[int, ...]:
        """The prompt as token ids, up to the beginning of the answer. Raises PromptRejected."""
        if not self.source:  # the model's own code renders text only
            return tuple(self._tokenizer.encode(self.render(prompt), add_special_tokens=False))
        style = self.call_style or CallStyle()
        return tuple(self._apply(prompt, style, tokenize=True, sanitize_control_tokens=True))

    def _apply(self, prompt: ChatPrompt, style: CallStyle, *, opens_answer: bool = True, **options: Any) -> Any:
        if reserved := RESERVED.intersection(prompt.template_kwargs):
            names = ", ".join(sorted(reserved))
            raise PromptRejected(f"The variables of the chat template can't set {names}.", "prompt.template_kwargs")
        if prompt.continues_answer:
            options["continue_final_message"] = "content" if prompt.conversation[-1].text else "reasoning_content"
        else:
            options["add_generation_prompt"] = opens_answer
        if prompt.tools:
            options["tools"] = [{"type": "function", "function": tool.function} for tool in prompt.tools]
        if self._substitute:
            options["chat_template"] = self._substitute
        messages = [style.message(message) for message in prompt.conversation]
        try:
            return self._tokenizer.apply_chat_template(messages, **options, **prompt.template_kwargs)
        except RENDERING_FAILURES as error:
            raise PromptRejected(
                f"The chat template of this model refuses the messages: {error}", "prompt.conversation"
            ) from error


def _substitute(tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> str:
    """A template for a model that has none."""
    return _inst_format(tokenizer.get_vocab()) if _is_mistral(tokenizer, config) else NO_TEMPLATE


def _is_mistral(tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> bool:
    names = [
        config.get("model_type"),
        *(config.get("architectures") or ()),
        tokenizer.init_kwargs.get("tokenizer_class"),
    ]
    return any(family in str(name).lower() for name in names for family in ("mistral", "mixtral"))


def _inst_format(vocab: Mapping[str, int]) -> str:
    """Mistral's [INST] format. Spaces surround its tags where they are plain text; a tekken vocabulary has no gaps."""
    spread = "" if "[INST]" in vocab else " "
    gap = " " if "\u2581" in vocab else ""
    return INST.replace("SPREAD", spread).replace("GAP", gap)
