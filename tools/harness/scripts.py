"""Parts of a scripted model: scripts, a tokenizer with a token per piece, and the template that chooses a script."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Script:
    """Answer of a scripted model, one token per piece. Pieces in bytes may cut a character. endless: it is repeated."""

    pieces: Sequence[str | bytes]
    endless: bool = False


def words(text: str) -> Script:
    """A script of `text`: one token per word with the white space before it."""
    return Script(re.findall(r"\s*\S+|\s+$", text))


def script_tokenizer(plays: Sequence[Script], tokens: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer with single bytes for the prompts, and a separate token for every position of every script.

    A position's token is its text and a mark that the decoder drops, so that equal pieces are different tokens. The
    characters of the mark stand for no bytes.
    """
    vocab = {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for number, play in enumerate(plays):
        for position, piece in enumerate(play.pieces):
            vocab[_piece_token(piece, number, position)] = len(vocab)
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("\ue000.*"), ""), decoders.ByteLevel()])
    specials = [BOS, EOS, *(cue(number) for number in range(len(plays))), *tokens]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def script_ids(tokenizer: Tokenizer, script: Script, number: int = 0) -> list[int]:
    """The token ids of a script's pieces; number: its index among the scripts of the tokenizer."""
    return [tokenizer.token_to_id(_piece_token(piece, number, n)) for n, piece in enumerate(script.pieces)]


def byte_level(model: models.BPE) -> Tokenizer:
    """A byte-level tokenizer, which has tokens for any text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _piece_token(piece: str | bytes, script: int, position: int) -> str:
    raw = piece.encode() if isinstance(piece, str) else piece
    return "".join(BYTE_CHARS[byte] for byte in raw) + "\ue000" + chr(0xF0000 + script) + chr(0xF0000 + position)


def _byte_chars() -> Iterator[str]:
    """The character of each byte in byte-level BPE: the byte's own if that is visible."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return (chr(byte if byte in visible else next(others)) for byte in range(0x100))


BYTE_CHARS = list(_byte_chars())


def cue(script: int) -> str:
    """The token that starts a script. White space, so that a prompt still ends in what its template appends."""
    return "\u2003" + "\u2002" * script + "\u2003"


XML_CALLS = (
    "{%- for call in message.tool_calls or [] %}"
    "{{ '<tool_call>\\n<function=' + call.function.name + '>\\n' }}"
    "{%- for key, value in call.function.arguments.items() %}"
    "{{ '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}"
    "{%- endfor %}{{ '</function>\\n</tool_call>\\n' }}{%- endfor %}"
)


def script_template(names: Sequence[str], generation_prompt: str, history: str | None = None) -> str:
    """A chat template that ends in the cue of the script whose name is in the last user message.

    history: "xml" for a template that writes past calls as Qwen3-Coder's does, None for one that does not write them.
    """
    content = "(message.content or '')" if history else "message.content"
    calls = XML_CALLS if history == "xml" else ""
    cases = "".join(
        f"{{%- {'if' if n == 0 else 'elif'} {name!r} in ask %}}{{{{ '{cue(n)}' }}}}" for n, name in enumerate(names)
    )
    return (
        "{%- if tools %}{{ tools | tojson }}{% endif %}"
        f"{{%- for message in messages %}}{{{{ message.role + ': ' + {content} + '\\n' }}}}{calls}{{%- endfor %}}"
        "{%- if add_generation_prompt %}"
        "{%- set ask = (messages | selectattr('role', 'equalto', 'user') | list | last).content %}"
        f"{{{{ 'assistant: ' + {generation_prompt!r} }}}}{cases}{{%- else %}}{{{{ '{cue(0)}' }}}}{{% endif %}}"
        "{%- endif %}"
    )


def successors(tokenizer: Tokenizer, plays: Sequence[Script]) -> Iterator[tuple[int, int]]:
    """Each token of the scripts with its successor."""
    eos = tokenizer.token_to_id(EOS)
    for number, play in enumerate(plays):
        line = script_ids(tokenizer, play, number)
        last = line[0] if play.endless else eos
        yield from pairwise([tokenizer.token_to_id(cue(number)), *line, last])
