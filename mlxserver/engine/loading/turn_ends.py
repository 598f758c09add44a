"""Ends of a turn: the tokens at which a model ends its answer.

They are stated at four places, which seldom agree: config.json, generation_config.json, the tokenizer's own end, and
the chat template, which writes one after an answer. All of them count. Tokens that end a turn in every model that has
them count, too: they are what a fine-tuned model writes whose configuration is still that of its base.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxserver.config.errors import abbreviate
from mlxserver.engine.loading.checkpoint_files import is_id, read_object
from mlxserver.engine.loading.metadata import text_configs
from mlxserver.engine.template_failures import TEMPLATE_FAILURES

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("engine")

KNOWN_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|eom|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
    }
)
HARMONY_ENDS = frozenset({"<|return|>", "<|call|>"})  # <|end|>, the end of a message, is not the end of a turn there
ANSWER = "\u2042 probe \u2042"
CALL = "probe_call"
PROBE_TOOL = {"type": "function", "function": {"name": CALL, "description": "", "parameters": {"type": "object"}}}
PROBE_CALL = {"type": "function", "id": "call00000", "function": {"name": CALL, "arguments": {}}}
PROBE: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
CALLING_PROBE = [PROBE[0], PROBE[1] | {"tool_calls": [PROBE_CALL]}]


def find_turn_ends(tokenizer: TokenizerWrapper, path: Path, vocab_size: int) -> frozenset[int]:
    """The ids of all tokens that end a turn. path: the checkpoint, whose files state some of them.

    What is no token is left out with a warning; so is an ordinary token that only a file names, beside other ends.
    """
    added = {token.content: number for number, token in _added_tokens(tokenizer).items()}
    ends = {number for number in _own_ends(tokenizer, added) if _exists(number, f"{path}: an end of turn", vocab_size)}
    stated = {number: place for number, place in _stated(path, added) if _exists(number, place, vocab_size)}
    if ends or stated.keys() & added.values():
        kept = [number for number, place in stated.items() if _is_special(number, place, tokenizer, added)]
    else:
        kept = list(stated)
    ends |= set(kept)
    if not ends:
        log.warning("%s: no token ends its answers: expected an eos_token_id in its generation_config.json", path)
    return frozenset(ends)


def _own_ends(tokenizer: TokenizerWrapper, added: Mapping[str, int]) -> Iterator[int]:
    """The ends that the tokenizer names and the template writes, and those of every model."""
    if is_id(tokenizer.eos_token_id):
        yield tokenizer.eos_token_id
    names = KNOWN_ENDS | HARMONY_ENDS if added.keys() >= HARMONY_ENDS else KNOWN_ENDS
    yield from (number for name, number in added.items() if name in names)
    yield from (added[name] for name in _written_ends(tokenizer, added.keys()))


def _written_ends(tokenizer: TokenizerWrapper, added: Collection[str]) -> set[str]:
    """The added tokens that the chat template writes behind an answer, at the end of a line each.

    None where it writes more than that: the beginning of another turn, say. A token that stands between the text of an
    answer and its calls ends no turn.
    """
    tail = _after_answer(tokenizer, PROBE)
    token = re.compile("|".join(re.escape(name) for name in sorted(filter(None, added), key=len, reverse=True)))
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    written = [token.findall(line) for line in lines]
    if len(lines) > 2 or any(
        "".join(names) != line or len(names) > 2 for names, line in zip(written, lines, strict=True)
    ):
        return set()
    between = _after_answer(tokenizer, CALLING_PROBE, tools=[PROBE_TOOL]).rpartition(CALL)[0]
    return {names[-1] for names in written} - {tokenizer.bos_token, *token.findall(between)}


def _after_answer(tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """What the chat template writes behind the answer; nothing if it can't render the messages, or has no answer."""
    if not tokenizer.has_chat_template:
        return ""
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False, **options))
    except TEMPLATE_FAILURES:
        return ""
    return text.rpartition(ANSWER)[2] if ANSWER in text else ""


def _stated(path: Path, added: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    """The ids that the files of a checkpoint state, each with its place. A text may stand for an added token."""
    for name in ("config.json", "generation_config.json"):
        try:
            content = read_object(path / name) or {}
        except ValueError:
            continue
        for part in text_configs(content):
            value, place = part.get("eos_token_id"), f"{path / name}: eos_token_id"
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                if isinstance(one, str) and one in added:
                    yield added[one], place
                elif is_id(one):
                    yield one, place
                else:
                    _warn(place, one)


def _exists(number: int, place: str, vocab_size: int) -> bool:
    if number < vocab_size:
        return True
    _warn(place, number, f"a token id below {vocab_size}")
    return False


def _is_special(number: int, place: str, tokenizer: TokenizerWrapper, added: Mapping[str, int]) -> bool:
    if not added or number in added.values():
        return True
    token = tokenizer.convert_ids_to_tokens(number)
    log.warning(
        "%s is %d, the ordinary token %s; expected a special one. It is left out.", place, number, abbreviate(token)
    )
    return False


def _warn(place: str, value: Any, expected: str = "a token id or a list of them") -> None:
    log.warning("%s is %s; expected %s. It is left out.", place, abbreviate(value), expected)


def _added_tokens(tokenizer: TokenizerWrapper) -> Mapping[int, Any]:
    """The tokens beside the learned vocabulary, special ones included; empty for a tokenizer that names none."""
    return getattr(tokenizer, "added_tokens_decoder", None) or {}
