"""Template in place of one that is missing: the [INST] format for a Mistral; any other model refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

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


def substitute(tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> str:
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
