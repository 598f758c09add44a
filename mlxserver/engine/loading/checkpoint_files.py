"""Checkpoint files, checked like input: a field that is wrong, and that the model works without, is left out.

Rule 1: every fault is logged with its file, its field, the value and what was expected.
Rule 2: the checkpoint is not changed. Where something is wrong, libraries read a temporary directory of links to its
        files, with corrected copies beside them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxserver.config.errors import abbreviate

log = logging.getLogger("engine")

OPTIONAL = ("generation_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Field:
    """What a field of a checkpoint's file may be. expected: that in words."""

    fits: Callable[[Any], bool]
    expected: str


def is_id(value: object) -> bool:
    """Whether a value is a token id, as far as that can be seen without the vocabulary."""
    return type(value) is int and 0 <= value < 2**31


def _is_ids(value: object) -> bool:
    return value is None or is_id(value) or (isinstance(value, list) and all(map(is_id, value)))


def _is_token(value: object) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))
    )


def _is_template(value: object) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
            for one in value
        )
    return value is None or isinstance(value, str) or (isinstance(value, dict) and all(map(_is_text, value.values())))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


IDS = Field(_is_ids, "a token id or a list of them")
TOKEN = Field(_is_token, 'a text, or an object with the text as its "content"')
TOKENS = {f"{name}_token": TOKEN for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}
LENGTH = Field(lambda value: value is None or (type(value) in (int, float) and value > 0), "a number more than 0")
FIELDS: Mapping[str, Mapping[str, Field]] = {
    "config.json": dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS),
    "generation_config.json": {"eos_token_id": IDS},
    "special_tokens_map.json": TOKENS,
    "tokenizer_config.json": {
        **TOKENS,
        "chat_template": Field(_is_template, 'a text, or a list of objects with "name" and "template"'),
        "model_max_length": LENGTH,
    },
    "added_tokens.json": {},
}


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file. Raises ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is {abbreviate(content)}; expected an object")
    return content


def refuse_code(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a config.json names a file of Python code in its checkpoint, which mlx-vlm may run."""
    if config.get("model_file"):
        raise ValueError("its config.json names code in the checkpoint (model_file)")


@contextlib.contextmanager
def checked(path: Path) -> Iterator[Path]:
    """A directory with the files of a checkpoint, without what is wrong in them; it exists as long as the block.

    Raises ValueError for a tokenizer_config.json that has no object in it: the model can't be used without.
    """
    corrected = dict(_corrections(path))
    if not corrected:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        copy = Path(name)
        for file in path.iterdir():
            if file.name not in corrected:
                (copy / file.name).symlink_to(file.resolve())
        for file_name, content in corrected.items():
            if content is not None:
                (copy / file_name).write_text(json.dumps(content))
        yield copy


def _corrections(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The files that need it, with their corrected content; None for one to be left out."""
    for name, fields in FIELDS.items():
        try:
            content = read_object(path / name)
        except ValueError as error:
            if name == "config.json":
                continue  # what reads it names the fault
            if name not in OPTIONAL:
                raise
            log.warning("%s: %s. It is left out.", path, error)
            yield name, None
            continue
        wrong = _wrong_fields(path / name, content or {}, fields)
        if content and wrong:
            yield name, {field: value for field, value in content.items() if field not in wrong}


def _wrong_fields(file: Path, content: Mapping[str, Any], fields: Mapping[str, Field]) -> set[str]:
    wrong = {name for name, field in fields.items() if name in content and not field.fits(content[name])}
    for name in sorted(wrong):
        if fields[name] is not IDS or name != "eos_token_id":  # turn_ends.py reports that one, and takes what is right
            log.warning(
                "%s: %s is %s; expected %s. It is left out.",
                file,
                name,
                abbreviate(content[name]),
                fields[name].expected,
            )
    return wrong
