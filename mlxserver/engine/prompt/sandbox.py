"""Attributes that a chat template reads: Jinja's sandbox, asked once per type and name instead of at every look.

Rule 1: what a template may read is decided by its environment alone. Kept are its decisions on exact types whose
        attributes are those of the type, and on namespaces, all of which depend on the type and the name only.
Rule 2: whatever else is looked up, is missing, or formats text (str.format), goes through the environment.
"""

from __future__ import annotations

import functools
from enum import Enum, auto
from types import NoneType
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace
from transformers.utils import chat_template_utils

_BUILT_IN = frozenset({dict, list, tuple, str, int, float, bool, NoneType})
_MOST_DECISIONS = 1024  # names may come from messages: `message | attr(name)`


class _Lookup(Enum):
    """How an attribute is found."""

    ATTRIBUTE = auto()  # of a built-in type, and safe
    ITEM = auto()  # of a dict, which has no such attribute
    VALUE = auto()  # of a namespace or a loop, and safe unless it formats text
    ENVIRONMENT = auto()


class Attributes:
    """Attributes as templates of one sandboxed environment get them."""

    def __init__(self, environment: SandboxedEnvironment) -> None:
        self._environment = environment
        self._get = environment.getattr
        self._lookups: dict[tuple[type, str], _Lookup] = {}

    def get(self, obj: Any, name: str) -> Any:
        """What the environment's getattr() returns."""
        lookup = self._lookups.get((type(obj), name)) or self._decide(obj, name)
        if lookup is _Lookup.ITEM:
            return obj[name] if name in obj else self._environment.undefined(obj=obj, name=name)
        if lookup is _Lookup.ATTRIBUTE:
            return getattr(obj, name)
        if lookup is _Lookup.VALUE:
            value = getattr(obj, name, self)
            if value is not self and self._environment.wrap_str_format(value) is None:
                return value
        return self._get(obj, name)

    def _decide(self, obj: Any, name: str) -> _Lookup:
        lookup = self._lookup(obj, name)
        if len(self._lookups) < _MOST_DECISIONS:
            self._lookups[type(obj), name] = lookup
        return lookup

    def _lookup(self, obj: Any, name: str) -> _Lookup:
        kind = type(obj)
        if type(name) is not str or not self._environment.is_safe_attribute(obj, name, None):
            return _Lookup.ENVIRONMENT
        if kind is LoopContext or issubclass(kind, Namespace):
            return _Lookup.VALUE
        if kind not in _BUILT_IN or name in ("format", "format_map"):
            return _Lookup.ENVIRONMENT
        if hasattr(obj, name):
            return _Lookup.ATTRIBUTE
        return _Lookup.ITEM if kind is dict else _Lookup.ENVIRONMENT


@functools.lru_cache
def look_up_once(source: str) -> None:
    """Have a template, as transformers compiles it, look attributes up so. Renders the same text."""
    if compile_template := getattr(chat_template_utils, "_compile_jinja_template", None):
        environment = compile_template(source).environment
        if isinstance(environment, SandboxedEnvironment):
            vars(environment)["getattr"] = Attributes(environment).get
