"""Text of a --model flag, KEY=SOURCE,NAME=VALUE,...: split into the fields of a model. Pure.

Rule: a value with commas, spaces or quotes in it stands in double or single quotes; commas there separate nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from mlxserver.config.errors import ConfigInvalid

EXPECTED = "KEY=SOURCE, then fields such as ,context_length=65536,pin=true; a value with commas in it is quoted"


def split_model(flag: str, text: str) -> tuple[str, str, Mapping[str, str]]:
    """Key, source, and the texts of the fields by name. flag: for errors. Raises ConfigInvalid."""
    key, equals, rest = text.partition("=")
    source, *items = _split(flag, text, rest) or [""]
    if rest.lstrip().startswith(","):
        source = ""
    if not equals or not source.strip():
        raise ConfigInvalid(flag, text, EXPECTED)
    fields: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ConfigInvalid(f"{flag} {key}", item, "NAME=VALUE; a value or a source with commas in it is quoted")
        if name.strip() in fields:
            raise ConfigInvalid(f"{flag} {key}", item, f"each field once; {name.strip()} is there already")
        fields[name.strip()] = value.strip()
    return key, source, fields


def _split(flag: str, text: str, rest: str) -> list[str]:
    """What stands between the commas, without its quotes."""
    reader = shlex.shlex(rest, posix=True)
    reader.whitespace, reader.whitespace_split = ",", True
    reader.commenters, reader.escape = "", ""
    try:
        return list(reader)
    except ValueError:
        raise ConfigInvalid(flag, text, f"{EXPECTED}, with a quote at each end") from None
