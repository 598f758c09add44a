"""Token ids of rendered prompts, encoded in segments, each of them once.

A conversation that grows is rendered with the same beginning again and again. Its text is cut before control tokens of
the chat template, and the ids of the segments are kept: of the next prompt, those are encoded that no recent one had.

Rule 1: the ids are exactly those of the whole text. The text is cut only where the tokenizer always splits it, before
        anything else is done to it: before an added token that is looked for in the text as it is, that begins
        with neither a letter nor white space, and that no other added token contains or overlaps.
Rule 2: that is tried, too, with each tokenizer (_PROBES). One that does not split there encodes every prompt whole.
"""

from __future__ import annotations

import functools
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_MOST_CHARACTERS = 8 << 20  # of the segments that are kept, of one model
_PROBES = ("Hello", "\n", " a", "b ", "\n\n", ".", "12", "\u00e9\u4e2d", "  ")  # what may stand on either side of a cut
_START, _END = (  # round marked tokens
    getattr(chat_template_utils, f"_CONTROL_TOKEN_{name}", default)
    for name, default in (("START", "\U000f0000"), ("END", "\U000f0001"))
)
MARK = _START  # stands before a control token that is text
_CAN_MARK = hasattr(chat_template_utils, "mark_control_tokens")  # transformers before 5.23 renders without marks


class SegmentEncoder:
    """Encoder of the rendered prompts of one tokenizer. source: the chat template, whose control tokens it cuts at.

    placeholder: text that stands for an image there, and is marked like a control token; "" for none.
    """

    def __init__(self, tokenizer: TokenizerWrapper, source: str, placeholder: str = "") -> None:
        self._tokenizer = tokenizer._tokenizer
        self._source = source
        self._placeholder = placeholder
        self._segments: OrderedDict[str, array[int]] = OrderedDict()
        self._characters = 0
        self._is_fast = isinstance(getattr(self._tokenizer, "backend_tokenizer", None), Tokenizer)
        self._has_own_code = tokenizer._chat_template or not _renders_as_usual(self._tokenizer)

    @property
    def marks_control_tokens(self) -> bool:
        """Whether mark() is of use: the template is rendered by transformers, and the ids come from tokenizers."""
        return _CAN_MARK and self._is_fast and not self._has_own_code

    def mark(self, values: Any, template: str | None) -> Any:
        """Messages, tools or variables, with the control tokens in their strings marked to be encoded as plain text."""
        return chat_template_utils.mark_control_tokens(values, self._control_tokens(template))

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text, in which control tokens may be marked."""
        ids: array[int] = array("I")
        for start, end in pairwise([0, *self._cut(text), len(text)]):
            ids += self._ids(text[start:end])
        return tuple(ids)

    def _cut(self, text: str) -> Iterator[int]:
        """Where a text is cut: before control tokens that are not marked."""
        for found in self._cuts.finditer(text) if self._cuts else ():
            if text[found.start() - 1 : found.start()] != _START:
                yield found.start()

    def _ids(self, segment: str) -> array[int]:
        if (known := self._segments.get(segment)) is not None:
            self._segments.move_to_end(segment)
            return known
        ids = array("I", self._encode(segment))
        self._segments[segment] = ids
        self._characters += len(segment)
        while self._characters > _MOST_CHARACTERS and len(self._segments) > 1:
            self._characters -= len(self._segments.popitem(last=False)[0])
        return ids

    def _encode(self, text: str) -> list[int]:
        if _START in text or _END in text:
            return list(chat_template_utils.encode_marked_chat(self._tokenizer, text))
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    @functools.lru_cache  # noqa: B019  (as long as the model is loaded)
    def _control_tokens(self, template: str | None) -> re.Pattern[str]:
        tokens = self._tokenizer._get_control_tokens(self._tokenizer.get_chat_template(template))
        tokens = (*tokens, self._placeholder) if self._placeholder else tuple(tokens)
        pattern: re.Pattern[str] = chat_template_utils._get_control_token_patterns(tokens)[0]
        return pattern

    @functools.cached_property
    def _cuts(self) -> re.Pattern[str] | None:
        """What a text is cut before; None if it has to be encoded whole."""
        tokens = [token for token in self._candidates() if self._is_split(token)] if self._is_fast else []
        return re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def _candidates(self) -> list[str]:
        """The control tokens that a rendered prompt may have, and that rule 1 allows."""
        added: Mapping[int, Any] = self._tokenizer.backend_tokenizer.get_added_tokens_decoder()
        every = [token.content for token in added.values()]
        written = set(self._tokenizer.special_tokens_map.values())
        return [
            token.content
            for token in added.values()
            if (token.content in self._source or token.content in written)
            and not (token.normalized or token.lstrip or token.single_word)
            and not (token.content[0].isalnum() or token.content[0].isspace() or token.content[0] == "_")
            and not any(_overlaps(token.content, other) for other in every)
        ]

    def _is_split(self, token: str) -> bool:
        """Whether the ids of probes do not depend on what stands on the other side of a token."""
        id = self._tokenizer.convert_tokens_to_ids(token)
        for before, after in pairwise((*_PROBES, token, _PROBES[0])):
            rest = self._encode(token + after)
            if rest[:1] != [id] or self._encode(before + token + after) != self._encode(before) + rest:
                return False
        return True


def unmarked(text: str) -> str:
    """A text without marks of control tokens."""
    return text.replace(_START, "").replace(_END, "")


def _overlaps(token: str, other: str) -> bool:
    """Whether an occurrence of `token` may be part of one of `other`, or of one that begins before it."""
    if token != other and token in other:
        return True
    return any(other.endswith(token[:length]) for length in range(1, min(len(token), len(other) + 1)))


def _renders_as_usual(tokenizer: Any) -> bool:
    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is PreTrainedTokenizerBase.apply_chat_template
