"""Template in place of a model's own, which is missing, or can't be rendered as it is.

Without one, a Mistral gets the [INST] format, and any other model a template that refuses every conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

NO_TEMPLATE = "{{ raise_exception('the model has no chat template, and is no Mistral') }}"

APPEND = re.compile(r"\{%-\s*set _ = ([\w.]+)\.append\((\w+)\)\s*-%\}")
POP = re.compile(r"\{%-\s*set (\w+) = ([\w.]+)\.pop\(0\)\s*-%\}")

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


def substitute(tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> str | None:
    """A template in place of the model's own, where it has none or one that can't be rendered as it is."""
    if tokenizer.has_chat_template:
        return _without_changes(tokenizer)
    return _inst_format(tokenizer.get_vocab()) if _is_mistral(tokenizer, config) else NO_TEMPLATE


def _without_changes(tokenizer: TokenizerWrapper) -> str | None:
    """The template with lists that are replaced, not changed, which transformers' sandbox refuses; None if it has none.

    Kimi K2's keeps the ids of calls so.
    """
    own = tokenizer.chat_template
    if not isinstance(own, str):
        return None
    written = APPEND.sub(r"{%- set \1 = \1 + [\2] -%}", own)
    written = POP.sub(r"{%- set \1 = \2[0] -%}{%- set \2 = \2[1:] -%}", written)
    return written if written != own else None


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
