"""Vocabulary of a model as llguidance reads it: the bytes of each token, and which tokens are control tokens.

llguidance reads a tokenizer with a Rust core from its JSON. A decoder that takes parts out of tokens by a regular
expression it does not follow: then it gets the bytes of each token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llguidance import LLTokenizer
from llguidance import TokenizerWrapper as TokenBytes
from tokenizers import Tokenizer

from mlxserver.engine.output.token_bytes import token_bytes

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class Vocabulary(Protocol):
    """What a grammar of text needs to know of the tokens."""

    def split(self, text: str) -> list[int | str]:
        """The control tokens in a text, which no string of a grammar matches, and what is between them."""

    def control_tokens(self) -> list[int]:
        """All control tokens but those that end a sequence."""


def in_lark(pieces: Sequence[int | str]) -> str:
    """A text in llguidance's Lark, split into control tokens and what is between them."""
    return " ".join(
        f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece, ensure_ascii=False) for piece in pieces
    )


def read_vocabulary(tokenizer: TokenizerWrapper, vocab_size: int) -> LLTokenizer:
    """The vocabulary of a tokenizer with a Rust core. Takes some tenths of a second. Raises ValueError."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ValueError("this model's tokenizer has no Rust core, which grammars need")
    described = json.loads(core.to_str()) | {"padding": None, "truncation": None}
    text = json.dumps(described)
    is_followed = not any(_cuts_by_regex(decoder) for decoder in _decoders(described["decoder"]))
    slices = LLTokenizer.json_slices()  # half the time of the general ones, at JSON
    eos = sorted(tokenizer.eos_token_ids)
    source = text if is_followed else TokenBytes(_Tokens(tokenizer, Tokenizer.from_str(text), eos[0]))
    return LLTokenizer(source, n_vocab=vocab_size, eos_token=eos, slices=slices)


def _decoders(decoder: Any) -> Sequence[Any]:
    return decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]


def _cuts_by_regex(decoder: Any) -> bool:
    return bool(decoder) and decoder["type"] == "Replace" and "Regex" in decoder["pattern"]


class _Tokens:
    """A tokenizer as llguidance takes it, with a core of its own: that of the model has modes."""

    def __init__(self, tokenizer: TokenizerWrapper, core: Tokenizer, eos: int) -> None:
        added = core.get_added_tokens_decoder()
        self.eos_token_id = eos
        self.bos_token_id = None
        self.special_token_ids = [token for token, entry in added.items() if entry.special]
        self.tokens = [token_bytes(tokenizer, token) for token in range(core.get_vocab_size())]
        self._core = core

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text."""
        return list(self._core.encode(text.decode(), add_special_tokens=False).ids)
