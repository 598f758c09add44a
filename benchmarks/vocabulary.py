"""Tokenizer directories for measurements, and prompts of a given length.

Rule 1: a model with an endless tokenizer never ends an answer: the id of its end-of-text token is beyond the
        vocabulary, so each server generates exactly max_tokens.
Rule 2: every token id below the vocabulary size has a text of its own, as in a trained model.
Rule 3: the same name gives the same prompts, and no two prompts of a run begin alike, so that a prefix cache matches
        repeated turns of a conversation and nothing else.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

END = "<|never|>"
# ChatML without a default system message: all prompts would begin with it.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "number", "night", "point", "home", "water", "room", "mother", "area", "money"),
    *("story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side"),
)


def write_endless_tokenizer(source: Path, target: Path, vocab_size: int) -> None:
    """Copy the tokenizer of `source` into `target`, filled up to vocab_size, with an end that is never produced.

    Raises ValueError if it has no byte-pair vocabulary, or more tokens than vocab_size.
    """
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise ValueError(f"{source}: the tokenizer is a {content['model']['type']}, expected BPE")
    size = 1 + max([*vocab.values(), *(token["id"] for token in content["added_tokens"])])
    if size > vocab_size:
        raise ValueError(f"{source}: the tokenizer has {size} tokens, expected at most the model's {vocab_size}")
    vocab.update({f"Ġfiller{number}": number for number in range(size, vocab_size)})
    content["added_tokens"].append(_special(vocab_size))
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"eos_token": END, "pad_token": END, "chat_template": TEMPLATE}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _special(token_id: int) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": END, **flags}


@cache
def _tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


class Prompts:
    """Generator of distinct texts of a given length in tokens, the same texts for the same name."""

    def __init__(self, directory: Path, name: str = "") -> None:
        self._tokenizer = _tokenizer(directory)
        self._random = random.Random(name)
        self._name = name
        self._made = 0

    def make(self, tokens: int) -> str:
        """A text of `tokens` tokens (without the chat template's), unlike any before."""
        self._made += 1
        words = [f"{self._name} {self._made} notes:".lstrip(), *self._random.choices(WORDS, k=tokens)]
        ids = self._tokenizer.encode(" ".join(words), add_special_tokens=False).ids
        return str(self._tokenizer.decode(ids[:tokens]))
