"""Token bytes: the bytes that a single token stands for in a text.

Rule 1: the bytes of a text's tokens joined are the text's, also where a token is no whole character.
Rule 2: a token's bytes are those that it has behind another token, with the space that a decoder drops at the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from mlxserver.engine.events import PromptToken, TokenLogprob
from mlxserver.engine.sequence import Logprobs

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

REPLACEMENT = "\ufffd"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_known: WeakKeyDictionary[TokenizerWrapper, dict[int, bytes]] = WeakKeyDictionary()


def token_logprob(
    tokenizer: TokenizerWrapper, token: int, logprob: float, top: Sequence[tuple[int, float]] = ()
) -> TokenLogprob:
    """A token with its text and bytes. top: the likeliest token ids with their log-probabilities."""
    likeliest = tuple(token_logprob(tokenizer, other, value) for other, value in top)
    encoded = token_bytes(tokenizer, token)
    return TokenLogprob(encoded.decode(errors="replace"), encoded, logprob, likeliest)


def prompt_tokens(
    tokenizer: TokenizerWrapper, tokens: Sequence[int], logprobs: Sequence[Logprobs]
) -> tuple[PromptToken, ...]:
    """The tokens of a prompt. logprobs: from the second on."""
    scored = [_prompt_token(tokenizer, *pair) for pair in zip(tokens[1:], logprobs, strict=True)]
    return (_prompt_token(tokenizer, tokens[0]), *scored)


def _prompt_token(tokenizer: TokenizerWrapper, token: int, logprobs: Logprobs | None = None) -> PromptToken:
    encoded = token_bytes(tokenizer, token)
    text = encoded.decode(errors="replace")
    if logprobs is None:
        return PromptToken(token, text, encoded)
    likeliest = (_prompt_token(tokenizer, other, Logprobs(value)) for other, value in logprobs.top)
    top = tuple(replace(other, rank=rank) for rank, other in enumerate(likeliest, 1))
    return PromptToken(token, text, encoded, logprobs.chosen, logprobs.rank, top)


def token_bytes(tokenizer: TokenizerWrapper, token: int) -> bytes:
    """The bytes of a token; none for an id outside the vocabulary. Computed once per token and tokenizer."""
    known = _known.setdefault(tokenizer, {})
    if token not in known:
        known[token] = _compute(tokenizer, token)
    return known[token]


def _compute(tokenizer: TokenizerWrapper, token: int) -> bytes:
    alone, twice = _decode(tokenizer, [token]), _decode(tokenizer, [token, token])
    text = twice[len(alone) :]
    if REPLACEMENT not in text:
        return text.encode()
    return _piece_bytes(str(tokenizer.convert_ids_to_tokens(token))) or text.encode()


def _decode(tokenizer: TokenizerWrapper, tokens: list[int]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return str(tokenizer.decode(tokens))
    return str(backend.decode(tokens, skip_special_tokens=False))


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a vocabulary entry that is no text: SentencePiece's <0xE2>, or characters that stand for bytes."""
    if byte := BYTE_PIECE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return bytes(BYTE_OF[char] for char in piece if char in BYTE_OF)


def _byte_characters() -> Iterator[str]:
    """The character for each byte in a byte-level vocabulary: itself where it is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return (chr(byte if byte in visible else next(others)) for byte in range(0x100))


BYTE_OF = {char: byte for byte, char in enumerate(_byte_characters())}
