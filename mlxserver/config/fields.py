"""What a setting accepts, read from the annotation of its dataclass field.

Rule 1: the annotation says all of it: Annotated[TYPE, Range(...), Size(), "what it means"]; all but TYPE may be absent.
        A list is Annotated[tuple[str, ...], Several(...), "what it means"]; text has commas between its items.
Rule 2: text (flags, environment) and TOML values go through the same check; only the reading of text comes before.
Rule 3: a wrong value is ConfigInvalid with the place it came from.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mlxserver.config.errors import ConfigInvalid

EXPECTATIONS = {str: "a non-empty string", bool: "true or false", int: "an integer", float: "a number"}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?([kMGT]i?)?B?", re.IGNORECASE | re.ASCII)
UNITS = {unit + i: base**power for power, unit in enumerate("kmgt", 1) for i, base in (("", 1000), ("i", 1024))}


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number, both included; is_open: without the minimum."""

    minimum: float
    maximum: float = math.inf
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        return self.minimum <= value <= self.maximum and not (self.is_open and value == self.minimum)

    def __str__(self) -> str:
        if self.is_open:
            return f"more than {self.minimum}" + ("" if self.maximum == math.inf else f" and at most {self.maximum}")
        if self.maximum == math.inf:
            return f"at least {self.minimum}"
        return f"from {self.minimum} to {self.maximum}"


@dataclass(frozen=True, slots=True)
class Size:
    """Marks a number of bytes, which may be written with a unit."""


@dataclass(frozen=True, slots=True)
class Several:
    """Marks a list of texts, each of which matches `pattern`; `expected` says it in words. A secret is never shown."""

    pattern: str
    expected: str
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: the type of its value, or the choices for it, its bounds and what it means."""

    type: type
    choices: tuple[str, ...] = ()
    range: Range | None = None
    meaning: str = ""
    is_size: bool = False
    several: Several | None = None

    @property
    def expected(self) -> str:
        """What it takes, as a noun phrase."""
        if self.several:
            return self.several.expected
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.is_size:
            return f"bytes {self.range or ''}, a number or a text such as 12GB or 512MiB"
        return f"{EXPECTATIONS[self.type]} {self.range or ''}".rstrip()

    def check(self, place: str, value: object) -> Any:
        """The value in the setting's type. Raises ConfigInvalid; true is no number, and a bounded one is not nan."""
        if self.several:
            return self._check_items(place, value, self.several)
        if self.is_size and isinstance(value, str):
            return self.read(place, value)
        accepted = (int, float) if self.type is float else (self.type,)
        if type(value) not in accepted or not self._is_allowed(value):
            raise ConfigInvalid(place, value, self.expected)
        return self.type(value)

    def read(self, place: str, text: str) -> Any:
        """The value that a text from a flag or the environment stands for. Raises ConfigInvalid."""
        try:
            value = self._parse(text)
        except (ValueError, KeyError):
            raise ConfigInvalid(place, text, self.expected) from None
        return self.check(place, value)

    def _check_items(self, place: str, value: object, several: Several) -> tuple[str, ...]:
        is_right = isinstance(value, list) and all(
            isinstance(item, str) and re.fullmatch(several.pattern, item) for item in value
        )
        if not is_right:
            raise ConfigInvalid(place, "(not shown)" if several.secret else value, several.expected)
        return tuple(value)  # type: ignore[arg-type]

    def _parse(self, text: str) -> Any:
        if self.several:
            return [item.strip() for item in text.split(",")]
        if self.type is bool:
            return BOOLEANS[text.lower()]
        return _bytes(text) if self.is_size else self.type(text)

    def _is_allowed(self, value: Any) -> bool:
        if self.type is str:
            return value in self.choices if self.choices else bool(value.strip())
        return self.range is None or value in self.range


def settings_of(schema: type) -> Mapping[str, Setting]:
    """The settings of a dataclass, by field name, its own before inherited ones. Fields that hold something else are
    left out.
    """
    hints = get_type_hints(schema, include_extras=True)
    hints = {name: hints[name] for name in schema.__annotations__} | hints
    found = {name: _setting(hint) for name, hint in hints.items()}
    return {name: setting for name, setting in found.items() if setting is not None}


def _setting(hint: Any) -> Setting | None:
    extras: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        extras = tuple(rest)
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(member for member in get_args(hint) if member is not type(None))
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    type_ = str if choices else hint
    several = next((extra for extra in extras if isinstance(extra, Several)), None)
    if type_ not in EXPECTATIONS and not several:
        return None
    bounds = next((extra for extra in extras if isinstance(extra, Range)), None)
    meaning = next((extra for extra in extras if isinstance(extra, str)), "")
    return Setting(type_, choices, bounds, meaning, any(isinstance(extra, Size) for extra in extras), several)


def _bytes(text: str) -> int:
    """The number of bytes that "12GB", "1.5 GiB" or "4096" stands for. Raises ValueError."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    return int(float(match[1]) * UNITS[match[2].lower()]) if match[2] else int(match[1])
