"""Scripted model of an agent: the n-th answer, after n results of tools, is the n-th of a script.

What an agent asks beside its task (a title, a summary) comes without the word of the task and gets the same short line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.harness.models import write_scripted
from tools.harness.scripts import Script, words

TASK = "notes.txt"  # the word in the user's message by which a conversation is the task

TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- set state = namespace(results=0, is_task=false) %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{% set state.results = state.results + 1 %}{% endif %}
{%- if message.role == 'user' and 'TASK' in message.content %}{% set state.is_task = true %}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- message.content or '' }}
{%- for tool_call in message.tool_calls or [] %}{% set tool_call = tool_call.function %}
{{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}
{%- if not state.is_task %}{{ CUES[0] }}{% else %}{{ CUES[[state.results + 1, LAST] | min] }}{% endif %}
{%- endif %}"""


def call(name: str, **arguments: Any) -> str:
    """An answer that thinks, and calls a function."""
    body = json.dumps({"name": name, "arguments": arguments})
    return f"I should call {name}.\n</think>\n\nI call it now.\n<tool_call>\n{body}\n</tool_call>"


def say(text: str) -> str:
    """An answer that thinks, and ends."""
    return f"Nothing is left to do.\n</think>\n\n{text}"


def agent_model(path: Path, answers: Sequence[str | Script], *, context: int = 200_000) -> Path:
    """Write a thinking model that gives these answers one after the other, the last one for ever."""
    given = (say("A short line."), *answers)
    plays = [answer if isinstance(answer, Script) else words(answer) for answer in given]
    template = TEMPLATE.replace("TASK", TASK).replace("LAST", str(len(answers)))
    return write_scripted(path, plays, template, tokens=("<think>", "</think>"), context=context)
