"""Log-probabilities of tokens, in the two forms that OpenAI's API has for them; of prompts also in vLLM's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from mlxserver.engine.events import PromptToken, TokenLogprob

MIN_LOGPROB = -9999.0  # what OpenAI sends for a token that can't be; JSON has no infinity


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities of a chat: per token its text, its bytes and the likeliest tokens at its position."""
    content = [_token(token) | {"top_logprobs": [_token(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Log-probabilities of a bare completion: parallel lists, an item per token.

    top_logprobs includes the chosen token. offset: where the first token begins in the text, in characters.
    """
    return {
        "tokens": [_name(token) for token in tokens],
        "token_logprobs": [_logprob(token) for token in tokens],
        "top_logprobs": [_likeliest(token, token.top) for token in tokens],
        "text_offset": _offsets(tokens, offset)[:-1],
    }


def echo_logprobs(tokens: Sequence[PromptToken], text: str, most: int) -> dict[str, Any]:
    """Log-probabilities of a prompt that an answer begins with, in the same form. most: of the likeliest tokens.

    The last token ends where the text ends; what the tokens have before its beginning, as a beginning of sequence, is
    at 0.
    """
    *_, end = _offsets(tokens, 0)
    offsets = _offsets(tokens, len(text) - end)
    return {
        "tokens": [_name(token) for token in tokens],
        "token_logprobs": [None if token.logprob is None else _logprob(token) for token in tokens],
        "top_logprobs": [None if token.logprob is None else _likeliest(token, token.top[:most]) for token in tokens],
        "text_offset": [max(0, offset) for offset in offsets[:-1]],
    }


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of a text and of what follows it."""
    return {name: first[name] + second[name] for name in first}


def prompt_logprobs(tokens: Sequence[PromptToken], most: int) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt in vLLM's form: per token an object by token id, null for the first.

    It has the likeliest tokens, `most` of them, and the prompt's own.
    """
    return [
        None if token.logprob is None else {str(each.id): _ranked(each) for each in (token, *token.top[:most])}
        for token in tokens
    ]


def _ranked(token: PromptToken) -> dict[str, Any]:
    return {"logprob": _logprob(token), "rank": token.rank, "decoded_token": token.text}


def _offsets(tokens: Sequence[TokenLogprob | PromptToken], offset: int) -> list[int]:
    """Where each token begins, and where the last one ends, in characters. offset: the first one's."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets = [offset]
    for token in tokens:
        offset += len(decoder.decode(token.bytes))
        offsets.append(offset)
    return offsets


def _likeliest(token: TokenLogprob | PromptToken, top: Sequence[TokenLogprob | PromptToken]) -> dict[str, float]:
    return {_name(each): _logprob(each) for each in (*top, token)}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": _logprob(token)}


def _logprob(token: TokenLogprob | PromptToken) -> float:
    return MIN_LOGPROB if token.logprob is None else max(token.logprob, MIN_LOGPROB)


def _name(token: TokenLogprob | PromptToken) -> str:
    """A token's text; its bytes, as OpenAI writes them, where they are no text by themselves."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
