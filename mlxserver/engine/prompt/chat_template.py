"""A model's chat template: messages -> text and tokens.

Rule 1: the template is the model's own. Without one, a Mistral gets the [INST] format, and any other model a template
        that refuses every conversation.
Rule 2: whatever a template raises is a PromptRejected with the template's own words.
Rule 3: control tokens come from the template alone. What looks like one in the messages is encoded as plain text.
Rule 4: what a template can do is found out by trying.
Rule 5: a tokenizer belongs to one thread at a time; so does a template.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.prompt.tool_text import PROBE, PROBE_TOOL, PROBED, STYLES, CallStyle
from mlxserver.engine.prompt.turns import Message, continued_field
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


class ChatTemplate:
    """Sets messages in a model's template. `config` is the model's config.json."""

    def __init__(self, tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._substitute = None if tokenizer.has_chat_template else _substitute(tokenizer, config)

    @property
    def source(self) -> str:
        """The Jinja text, all of it where a model has several; empty for a model that renders with code of its own."""
        own = self._tokenizer.chat_template
        return self._substitute or ("\n".join(own.values()) if isinstance(own, dict) else own or "")

    def has_variable(self, name: str) -> bool:
        """Whether the template speaks of a variable. A model's own code may know any."""
        return not self.source or name in self.source

    @functools.cached_property
    def has_system(self) -> bool:
        """Whether a system message is understood."""
        probe = [{"role": "system", "content": "\u2042 probe \u2042"}, {"role": "user", "content": "Hello"}]
        return self._shows(["\u2042 probe \u2042"], probe, ChatPrompt(probe))

    @functools.cached_property
    def call_style(self) -> CallStyle | None:
        """How tool calls stand in the history; None where tools, calls or results have no place."""
        if not self._tokenizer.has_tool_calling:
            return None
        prompt = ChatPrompt(PROBE, tools=[PROBE_TOOL])
        return next((style for style in STYLES if self._shows(PROBED, style.apply(PROBE), prompt)), None)

    def _shows(self, words: Sequence[str], messages: Sequence[Message], prompt: ChatPrompt) -> bool:
        try:
            text = self.render(messages, prompt)
        except PromptRejected:
            return False
        return all(word in text for word in words)

    def render(self, messages: Sequence[Message], prompt: ChatPrompt, *, opens_answer: bool = True) -> str:
        """`messages` as text, with the prompt's tools and template_kwargs; up to the beginning of the answer or not.

        Raises PromptRejected.
        """
        return str(self._apply(messages, prompt, opens_answer=opens_answer, tokenize=False))

    def encode(self, messages: Sequence[Message], prompt: ChatPrompt) -> tuple[int, ...]:
        """`messages` as token ids, up to the beginning of the answer.

        Raises PromptRejected.
        """
        if not self.source:  # the model's own code renders text only
            return tuple(self._tokenizer.encode(self.render(messages, prompt), add_special_tokens=False))
        return tuple(self._apply(messages, prompt, tokenize=True, sanitize_control_tokens=True))

    def _apply(
        self, messages: Sequence[Message], prompt: ChatPrompt, *, opens_answer: bool = True, **options: Any
    ) -> Any:
        if reserved := RESERVED.intersection(prompt.template_kwargs):
            names = ", ".join(sorted(reserved))
            raise PromptRejected(f"chat_template_kwargs can't set {names}.", "chat_template_kwargs")
        if prompt.continues_answer:
            options["continue_final_message"] = continued_field(messages[-1])
        else:
            options["add_generation_prompt"] = opens_answer
        if prompt.tools:
            options["tools"] = list(prompt.tools)
        if self._substitute:
            options["chat_template"] = self._substitute
        try:
            return self._tokenizer.apply_chat_template(list(messages), **options, **prompt.template_kwargs)
        except RENDERING_FAILURES as error:
            raise PromptRejected(f"The chat template of this model refuses the messages: {error}") from error


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
    """Mistral's [INST] format. Where its words are plain text they stand apart; a tekken vocabulary has no gaps."""
    spread = "" if "[INST]" in vocab else " "
    gap = " " if "\u2581" in vocab else ""
    return INST.replace("SPREAD", spread).replace("GAP", gap)
