"""Reasoning formats: the marks by which families of models set their reasoning apart from the answer.

Rule 1: a format is found by what the chat template contains, else by the tokens of the vocabulary.
Rule 2: the first format of the table that matches is the model's, so that one whose marks stand in another's template
        comes before it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True, slots=True)
class ChannelFormat:
    """Messages with headers, of which an answer has several: START header MESSAGE body END.

    new_header: a text that begins another header, also inside a body. ends: any of them ends a body. reasoning, call:
    found in the headers of reasoning and of calls; `name` is the group with the function's name.
    """

    start: str
    message: str
    ends: tuple[str, ...]
    reasoning: re.Pattern[str]
    new_header: str = ""
    call: re.Pattern[str] | None = None


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Marks of one family.

    start, end: around the reasoning. dropped: further marks, which are no part of the answer. closing: a mark that is
    dropped at the very end of the answer. has_control_marks: all marks count anywhere in the answer, in which reasoning
    may come again; otherwise only before its first text, so that an answer may mention them. answers: texts by which
    the model begins its answer behind the reasoning, the first of them the one that a grammar follows. channels: of a
    family that writes messages with headers. turn_ends: tokens that end the answer, whatever the model's files say.
    template, vocab: how it is found: any of these texts in the template, or all of these tokens.
    """

    start: str
    end: str
    dropped: tuple[str, ...] = ()
    closing: str = ""
    has_control_marks: bool = False
    answers: tuple[str, ...] = ()
    channels: ChannelFormat | None = None
    turn_ends: tuple[str, ...] = ()
    template: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()

    @property
    def is_everywhere(self) -> bool:
        """Whether the marks may come in every answer, also in one without reasoning."""
        return self.has_control_marks or self.channels is not None

    def is_named(self, template: str) -> bool:
        """Whether a chat template has it."""
        return any(text in template for text in self.template)

    def is_known(self, vocab: Container[str]) -> bool:
        """Whether a vocabulary has it."""
        return bool(self.vocab) and all(token in vocab for token in self.vocab)


def _tags(start: str, end: str) -> ReasoningFormat:
    """A pair of tags, either of which in the template tells."""
    return ReasoningFormat(start, end, template=(start, end), vocab=(start, end))


def _command(section: str) -> ReasoningFormat:
    """Cohere's format. section: the name of an answer's part that is text."""
    start, end = f"<|START_{section}|>", f"<|END_{section}|>"
    return ReasoningFormat(
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        has_control_marks=True,
        answers=(start, "<|START_ACTION|>"),
        template=(start,),
        vocab=("<|START_THINKING|>", "<|END_THINKING|>", start, end),
    )


HARMONY = ChannelFormat(
    "<|start|>",
    "<|message|>",
    ("<|end|>", "<|call|>", "<|return|>"),
    reasoning=re.compile(r"<\|channel\|>\s*analysis"),
    new_header="<|channel|>",
    call=re.compile(r"\bto=(?P<name>[^\s<]+)"),
)
RECIPIENTS = ChannelFormat("<|start|>", "<|message|>", ("<|eom|>", "<|eot|>"), reasoning=re.compile(r"\bto=self\b"))

THINK = ReasoningFormat(
    "<think>",
    "</think>",
    # The last two are the beginnings of templates that do not name the tags: MiMo's and MiniMax M1's.
    template=("<think>", "</think>", "You are MiMo", "<beginning_of_sentence>ai name=assistant"),
    vocab=("<think>", "</think>"),
)

FORMATS = (
    ReasoningFormat(  # gpt-oss
        "<|channel|>analysis<|message|>",
        "<|end|>",
        answers=("<|start|>assistant<|channel|>final<|message|>", "<|start|>assistant<|channel|>commentary"),
        channels=HARMONY,
        turn_ends=("<|return|>", "<|call|>"),
        template=("<|channel|>",),
        vocab=("<|start|>", "<|channel|>", "<|message|>"),
    ),
    ReasoningFormat(  # Muse
        " to=self<|message|>",
        "<|eom|>",
        answers=("<|start|>assistant to=user<|message|>", "<|start|>assistant to="),
        channels=RECIPIENTS,
        turn_ends=("<|eot|>",),
        template=("to=self<|message|>",),
        vocab=("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
    ),
    ReasoningFormat(  # Gemma 4
        "<|channel>thought",
        "<channel|>",
        dropped=("<|channel>",),
        has_control_marks=True,
        turn_ends=("<|tool_response>",),  # which follows the calls in the same turn
        template=("<|channel>",),
        vocab=("<|channel>", "<channel|>"),
    ),
    ReasoningFormat(  # Kimi K3
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        dropped=(
            "<|open|>response<|sep|>",
            "<|close|>response<|sep|>",
            "<|close|>message<|sep|>",
            "<|end_of_msg|>",
        ),
        has_control_marks=True,
        answers=("<|open|>response<|sep|>", "<|open|>tools<|sep|>"),
        template=("'<|open|>'", "<|open|>think"),
        vocab=("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
    ),
    _command("TEXT"),
    _command("RESPONSE"),  # Command A and R7B
    ReasoningFormat(  # Apertus
        "<|inner_prefix|>",
        "<|inner_suffix|>",
        has_control_marks=True,
        template=("<|inner_prefix|>",),
        vocab=("<|inner_prefix|>", "<|inner_suffix|>"),
    ),
    ReasoningFormat(  # Solar
        "<|think|>",
        "<|end|>",
        dropped=("<|begin|>assistant", "<|content|>", "<|tool_calls|>"),
        has_control_marks=True,
        answers=("<|begin|>assistant<|content|>", "<|begin|>assistant<|tool_calls|>"),
        turn_ends=("<|flush|>", "<|calls|>"),
        template=("<|begin|>assistant<|think|>",),
        vocab=("<|begin|>", "<|think|>", "<|content|>", "<|end|>"),
    ),
    ReasoningFormat(  # Apriel
        "Here are my reasoning steps:",
        "[BEGIN FINAL RESPONSE]",
        closing="[END FINAL RESPONSE]",
        template=("[BEGIN FINAL RESPONSE]",),
    ),
    ReasoningFormat(  # Granite 3.2
        "Here is my thought process:",
        "Here is my response:",
        template=("Here is my thought process:",),
    ),
    ReasoningFormat(  # Granite 3.3
        "<think>",
        "</think>",
        dropped=("<response>",),
        closing="</response>",
        template=("<response></response>",),
    ),
    _tags("<seed:think>", "</seed:think>"),  # Seed-OSS
    ReasoningFormat(  # Hy3, whose template puts the tags together
        "<think:opensource>",
        "</think:opensource>",
        template=("'<think{}>'", "<think:opensource>"),
        vocab=("<think:opensource>", "</think:opensource>"),
    ),
    _tags("<mm:think>", "</mm:think>"),  # MiniMax M3
    _tags("<longcat_think>", "</longcat_think>"),
    _tags("<|think:start|>", "<|think:end|>"),
    ReasoningFormat("[THINK]", "[/THINK]", template=("[THINK]", "[/THINK]")),  # vocabularies of models without it, too
    THINK,
)


def find_format(tokenizer: TokenizerWrapper) -> ReasoningFormat | None:
    """The format of a model; None where neither template nor vocabulary show one."""
    own = tokenizer.chat_template
    template = "\n".join(own.values()) if isinstance(own, dict) else own or ""
    vocab = tokenizer.get_vocab()
    named = (known for known in FORMATS if known.is_named(template))
    return next(named, None) or next((known for known in FORMATS if known.is_known(vocab)), None)


def thinking_tags(tokenizer: TokenizerWrapper) -> tuple[str, str]:
    """The marks around a model's reasoning; <think> and </think> for a model that names none."""
    found = find_format(tokenizer) or THINK
    return found.start, found.end


def turn_ends(tokenizer: TokenizerWrapper, known: Collection[int]) -> set[int]:
    """The tokens that end an answer: the known ones and the format's own, less those that end only a message of it."""
    found, vocab = find_format(tokenizer), tokenizer.get_vocab()
    if found is None:
        return set(known)
    inner = (found.end, *(found.channels.ends if found.channels else ()))
    own = {vocab[token] for token in found.turn_ends if token in vocab}
    return {*known, *own} - ({vocab[token] for token in inner if token in vocab} - own)
