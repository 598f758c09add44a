"""Settings as their dataclass fields declare them: what a field accepts, and its marks.

Invariants
1. The annotation is the whole declaration: Annotated[TYPE, Range(...), Size(), Live(), "meaning"]; all but TYPE are
   optional. A list is Annotated[tuple[str, ...], Several(...), "meaning"]; as text it has commas between its items.
2. Text (flags, environment) and TOML values pass the same check; only parsing the text comes before it.
3. A wrong value raises ConfigInvalid with its place. A secret one is not shown.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
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
class Several:
    """List of texts, each of which matches `pattern`; `expected` is that in words."""

    pattern: str
    expected: str


class Size:
    """Mark of a number of bytes, which may be written with a unit."""


class Secret:
    """Mark of a setting whose value is shown nowhere."""


class Live:
    """Mark of a setting that applies at a reload. The others need a restart; of a model, that it is loaded anew."""


class Shared:
    """Mark of a setting that must be equal on all ranks."""


class Identity:
    """Mark of a model's setting that makes it another model: two specs of one key that both state it must agree."""


class Internal:
    """Mark of a model's field that is no setting: the manager finds it at a load."""


class PerRequest:
    """Mark of a sampling parameter of single requests, which has no default of a model."""


Mark = Size | Secret | Live | Shared | Identity | Internal | PerRequest


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: the type of its value, or the choices for it, its bounds and its meaning."""

    type: type
    choices: tuple[str | int, ...] = ()
    range: Range | None = None
    meaning: str = ""
    is_size: bool = False
    is_secret: bool = False
    several: Several | None = None

    @property
    def expected(self) -> str:
        """What the setting accepts, as a noun phrase."""
        if self.several:
            return self.several.expected
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.is_size:
            return f"bytes {self.range or ''}, a number or a text such as 12GB or 512MiB"
        return f"{EXPECTATIONS[self.type]} {self.range or ''}".rstrip()

    def check(self, place: str, value: Any) -> Any:
        """The value in the setting's type. Raises ConfigInvalid, also for true as a number and NaN in a range."""
        if self.several:
            return self._check_items(place, value, self.several)
        if self.is_size and isinstance(value, str):
            return self.read(place, value)
        is_right = type(value) in ((int, float) if self.type is float else (self.type,))
        if is_right and self.choices:
            is_right = value in self.choices
        elif is_right and self.type is str:
            is_right = bool(value.strip())
        if is_right and self.range:
            is_right = value in self.range
        if not is_right:
            raise ConfigInvalid(place, value, self.expected)
        return self.type(value)

    def read(self, place: str, text: str) -> Any:
        """The value of a text from a flag or the environment. Raises ConfigInvalid."""
        try:
            value = self._parse(text)
        except (ValueError, KeyError):
            raise ConfigInvalid(place, text, self.expected) from None
        return self.check(place, value)

    def _check_items(self, place: str, value: object, several: Several) -> tuple[str, ...]:
        is_right = isinstance(value, list | tuple) and all(
            isinstance(item, str) and re.fullmatch(several.pattern, item) for item in value
        )
        if not is_right:
            raise ConfigInvalid(place, "(not shown)" if self.is_secret else value, several.expected)
        return tuple(value)  # type: ignore[arg-type]

    def _parse(self, text: str) -> Any:
        if self.several:
            return [item.strip() for item in text.split(",")]
        if self.type is bool:
            return BOOLEANS[text.lower()]
        return _bytes(text) if self.is_size else self.type(text)


@cache
def settings_of(schema: type) -> Mapping[str, Setting]:
    """Settings of a dataclass by field name, its own before inherited ones, without fields of other types and internal
    ones.
    """
    found = {name: _setting(*_declaration(hint)) for name, hint in _hints(schema).items()}
    internal = marked(schema, Internal)
    return {name: setting for name, setting in found.items() if setting is not None and name not in internal}


@cache
def marked(schema: type, mark: type[Mark]) -> tuple[str, ...]:
    """Names of the fields of a dataclass that have a mark, whatever their type."""
    hints = _hints(schema).items()
    return tuple(name for name, hint in hints if any(isinstance(extra, mark) for extra in _declaration(hint)[1]))


def _hints(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema, include_extras=True)
    return {name: hints[name] for name in schema.__annotations__} | hints


def _declaration(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type of an annotation, and what else it has."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _setting(hint: Any, extras: tuple[Any, ...]) -> Setting | None:
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(member for member in get_args(hint) if member is not type(None))
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    type_ = type(choices[0]) if choices else hint
    several = next((extra for extra in extras if isinstance(extra, Several)), None)
    if type_ not in EXPECTATIONS and not several:
        return None
    return Setting(
        type_,
        choices,
        range=next((extra for extra in extras if isinstance(extra, Range)), None),
        meaning=next((extra for extra in extras if isinstance(extra, str)), ""),
        is_size=any(isinstance(extra, Size) for extra in extras),
        is_secret=any(isinstance(extra, Secret) for extra in extras),
        several=several,
    )


def _bytes(text: str) -> int:
    """Number of bytes that "12GB", "1.5 GiB" or "4096" means. Raises ValueError."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    return int(float(match[1]) * UNITS[match[2].lower()]) if match[2] else int(match[1])
