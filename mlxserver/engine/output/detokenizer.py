"""Detokenizer: token ids -> text, one token at a time.

Rule 1: the pieces joined are what decoding all ids at once gives, special tokens included. Only where bytes make no
        character at all may U+FFFD stand at another place.
Rule 2: bytes of an incomplete character wait for the rest; what stays incomplete is U+FFFD at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class Detokenizer(Protocol):
    """Decoder of one sequence."""

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty if it completes none. Unknown ids have no text."""

    def flush(self) -> str:
        """The text of what is incomplete."""


def make_detokenizer(tokenizer: TokenizerWrapper) -> Detokenizer:
    """A fresh detokenizer: the Rust tokenizer's, or mlx-lm's for any other tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return StreamDetokenizer(backend) if backend is not None else SlowDetokenizer(tokenizer.detokenizer)


class StreamDetokenizer:
    """Detokenizer on the Rust tokenizer's decoding stream."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=False)
        self._incomplete: list[int] = []

    def feed(self, token: int) -> str:
        """The text that `token` completes."""
        text: str | None
        try:
            text = self._stream.step(self._backend, token)
        except Exception:  # the stream raises no narrower one: bytes that make no character changed the text before
            stale, self._stream = self.flush(), DecodeStream(skip_special_tokens=False)
            return stale + self.feed(token)
        if text is None:
            self._incomplete.append(token)
            return ""
        self._incomplete.clear()
        return text

    def flush(self) -> str:
        """The text of what is incomplete."""
        text: str = self._backend.decode(self._incomplete, skip_special_tokens=False)
        self._incomplete.clear()
        return text


class SlowDetokenizer:
    """Detokenizer on one of mlx-lm's streaming ones."""

    def __init__(self, detokenizer: Any) -> None:
        self._detokenizer = detokenizer

    def feed(self, token: int) -> str:
        """The text that `token` completes."""
        self._detokenizer.add_token(token)
        text: str = self._detokenizer.last_segment
        return text

    def flush(self) -> str:
        """The text of what is incomplete."""
        self._detokenizer.finalize()
        text: str = self._detokenizer.last_segment
        return text
