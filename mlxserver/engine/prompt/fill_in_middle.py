"""Fill in the middle: prompts of a text before a gap and a text behind it, for models that were trained on such.

Rule: only tokens of the tokenizer's vocabulary mark the parts; spelt as text, the marks mean nothing to a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.prompt.turns import check_text
from mlxserver.engine.requests import FormattedPrompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_ANCHOR = "☺"  # no token of a vocabulary joins it with what follows, but for byte-level ones


@dataclass(frozen=True, slots=True)
class Marks:
    """Marks of a family. middle: at the end of the prompt, none where the second part's mark is enough.

    suffix_first: the makers' order is suffix, prefix, middle. ends: other marks at which such an answer ends.
    is_spaced: the tokenizer begins a text with a space, which the suffix must not have.
    """

    prefix: str
    suffix: str
    middle: str | None
    suffix_first: bool = False
    ends: tuple[str, ...] = ()
    is_spaced: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        """The marks that a vocabulary has to have."""
        return tuple(filter(None, (self.prefix, self.suffix, self.middle)))


_CODE_ENDS = ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")

# In the order that each family's makers document, in the papers, model cards or reference code.
MARKS = (
    # Qwen2.5-Coder, Qwen3-Coder, Granite 4, CodeGemma
    Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ends=_CODE_ENDS),
    # StarCoder, StarCoder 2, Granite Code, StableCode
    Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ends=("<|endoftext|>", "<fim_pad>", "<file_sep>")),
    Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<|endoftext|>", "<fim-pad>")),  # SantaCoder
    # Seed-Coder
    Marks("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),
    # CodeLlama
    Marks("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",), is_spaced=True),
    # DeepSeek-Coder, DeepSeek-Coder V2
    Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    # Codestral
    Marks("[PREFIX]", "[SUFFIX]", None, suffix_first=True, is_spaced=True),
)


class FillInMiddle:
    """Fill-in-the-middle prompts of one tokenizer. `marks` is None where its vocabulary has none of MARKS."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.marks = next((marks for marks in MARKS if all(mark in vocabulary for mark in marks.needed)), None)
        used = (*self.marks.needed, *self.marks.ends) if self.marks else ()
        self._ids: dict[str, int] = {mark: vocabulary[mark] for mark in used if mark in vocabulary}

    def format(self, prefix: str, suffix: str) -> FormattedPrompt:
        """The prompt for the text between the two. Raises PromptRejected."""
        if self.marks is None:
            message = "suffix: this model has no tokens to fill in the middle; expected none, or another model."
            raise PromptRejected(message, "suffix")
        check_text(prefix, "prompt")
        check_text(suffix, "suffix")
        tokens = tuple(self._tokens(self.marks, prefix, suffix))
        return FormattedPrompt(tokens, self._tokenizer.decode(list(tokens)), ends=tuple(self._ids.values()))

    def _tokens(self, marks: Marks, prefix: str, suffix: str) -> Iterator[int]:
        first = self._tokenizer.encode("")[:1]
        if first == [self._tokenizer.bos_token_id]:
            yield from first
        parts = [(marks.prefix, self._encode(prefix)), (marks.suffix, self._encode_suffix(suffix))]
        for mark, tokens in reversed(parts) if marks.suffix_first else parts:
            yield self._ids[mark]
            yield from tokens
        if marks.middle:
            yield self._ids[marks.middle]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _encode_suffix(self, text: str) -> list[int]:
        """Tokens without the space that the tokenizer puts before a text."""
        if self.marks is None or not self.marks.is_spaced:
            return self._encode(text)
        anchor = self._encode(_ANCHOR)
        anchored = self._encode(_ANCHOR + text)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self._encode(text)
