"""Log-probabilities of tokens, in the two forms that OpenAI's API has for them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from mlxserver.engine.events import TokenLogprob

MIN_LOGPROB = -9999.0  # what OpenAI sends for a token that can't be; JSON has no infinity


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities of a chat: per token its text, its bytes and the likeliest tokens at its position."""
    content = [_token(token) | {"top_logprobs": [_token(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Log-probabilities of a bare completion: parallel lists, an item per token.

    top_logprobs includes the chosen token. offset: where the first token begins in the text, in characters.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(decoder.decode(token.bytes))
    return {
        "tokens": [_name(token) for token in tokens],
        "token_logprobs": [_logprob(token) for token in tokens],
        "top_logprobs": [{_name(each): _logprob(each) for each in (*token.top, token)} for token in tokens],
        "text_offset": offsets,
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": _logprob(token)}


def _logprob(token: TokenLogprob) -> float:
    return max(token.logprob, MIN_LOGPROB)


def _name(token: TokenLogprob) -> str:
    """A token's text; its bytes, as OpenAI writes them, where they are no text by themselves."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
