"""Grammar of a custom tool's text, as a pattern of JSON Schema.

A grammar in Lark whose rules do not refer to themselves describes a regular language: its rules are put in their places
until one regular expression is left.

Rule: what can't be read, or is no such grammar, has no pattern. It is for the caller to describe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_LENGTH = 20_000  # of a pattern, which may grow with each use of a rule
SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")
TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[is]*)
    |(?P<define>[?!]*\w+(?:\.-?\d+)?[ \t]*:)
    |(?P<name>\w+)
    |(?P<mark>->|\.\.|[|()\[\]?*+~])""",
    re.VERBOSE,
)
IMPORT = re.compile(r"^%import\s+common\.(\w+)(?:\s*->\s*(\w+))?[ \t]*$", re.MULTILINE)
COMMON = {  # of Lark's library of terminals
    "LF": r"\n",
    "CR": r"\r",
    "NEWLINE": r"(?:\r?\n)+",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9A-Fa-f]",
    "INT": "[0-9]+",
    "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": r"(?:[0-9]+\.[0-9]*|\.[0-9]+)",
    "NUMBER": r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "SIGNED_NUMBER": r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "LETTER": "[A-Za-z]",
    "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]",
    "WORD": "[A-Za-z]+",
    "CNAME": "[_A-Za-z][_A-Za-z0-9]*",
    "ESCAPED_STRING": r'"(?:[^"\\\n]|\\.)*"',
}


class Unreadable(Exception):
    """The grammar has something that a pattern can't say, or that is not read."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of Lark: its kind, a group of TOKEN, and its text."""

    kind: str
    text: str


END = Token("end", "")


def pattern_of(syntax: str | None, definition: str) -> str | None:
    """Pattern of the whole text, None where there is none. syntax: "lark" or "regex"."""
    if syntax == "regex":
        return f"^(?:{definition})$"
    try:
        return f"^(?:{_Rules(definition).pattern('start')})$" if syntax == "lark" else None
    except (Unreadable, RecursionError):
        return None


class _Rules:
    """Rules and terminals of a grammar, by name."""

    def __init__(self, definition: str) -> None:
        self._patterns = {alias or name: _common(name) for name, alias in IMPORT.findall(definition)}
        self._tokens: dict[str, list[Token]] = {}
        rule: list[Token] = []
        for token in _tokens(IMPORT.sub("", definition)):
            if token.kind == "define":
                rule = self._tokens.setdefault(re.sub(r"^[?!]*|[.:\s].*$", "", token.text), [])
            else:
                rule.append(token)
        self._open: set[str] = set()

    def pattern(self, name: str) -> str:
        """The pattern of a rule. Raises Unreadable."""
        if name not in self._patterns:
            if name not in self._tokens or name in self._open:
                raise Unreadable(name)
            self._open.add(name)
            self._patterns[name] = _Expression(self._tokens[name], self).read()
            self._open.discard(name)
        return self._patterns[name]


class _Expression:
    """Reader of what a rule is made of."""

    def __init__(self, tokens: list[Token], rules: _Rules) -> None:
        self._tokens = tokens
        self._at = 0
        self._rules = rules

    def read(self) -> str:
        """The pattern of all of it. Raises Unreadable."""
        pattern = self._alternatives()
        if self._next is not END or len(pattern) > MAX_LENGTH:
            raise Unreadable(self._next.text)
        return pattern

    @property
    def _next(self) -> Token:
        return self._tokens[self._at] if self._at < len(self._tokens) else END

    def _take(self, text: str) -> bool:
        is_there = self._next == Token("mark", text)
        self._at += is_there
        return is_there

    def _alternatives(self) -> str:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"

    def _sequence(self) -> str:
        parts = []
        while self._next.kind in ("string", "regex", "name") or self._next.text in ("(", "["):
            parts.append(self._item())
        if self._take("->"):  # the name of an alternative
            self._at += 1
        return "".join(parts)

    def _item(self) -> str:
        pattern = self._atom()
        for mark in "?*+":
            if self._take(mark):
                return f"(?:{pattern}){mark}"
        if not self._take("~"):
            return pattern
        least = most = self._number()
        if self._take(".."):
            most = self._number()
        return f"(?:{pattern}){{{least},{most}}}"

    def _atom(self) -> str:
        token = self._next
        self._at += 1
        if token.kind == "string":
            return self._range(token) if self._take("..") else _literal(token.text)
        if token.kind == "regex":
            body, _, flags = token.text[1:].rpartition("/")
            return f"(?{flags}:{body})"
        if token.kind == "name":
            return self._rules.pattern(token.text)
        pattern = self._alternatives()
        if not self._take(")" if token.text == "(" else "]"):
            raise Unreadable(token.text)
        return f"(?:{pattern}){'?' if token.text == '[' else ''}"

    def _range(self, first: Token) -> str:
        bounds = [_text(each.text) for each in (first, self._next) if each.kind == "string"]
        self._at += 1
        if [len(bound) for bound in bounds] != [1, 1]:
            raise Unreadable(first.text)
        return f"[\\x{{{ord(bounds[0]):x}}}-\\x{{{ord(bounds[1]):x}}}]"

    def _number(self) -> int:
        text = self._next.text
        self._at += 1
        if not text.isascii() or not text.isdigit() or len(text) > 4:
            raise Unreadable(text)
        return int(text)


def _tokens(definition: str) -> list[Token]:
    found, at = [], 0
    while at < len(definition):
        match = TOKEN.match(definition, at)
        if match is None:
            raise Unreadable(definition[at : at + 20])
        at = match.end()
        if match.lastgroup and match.lastgroup != "space":
            found.append(Token(match.lastgroup, match.group()))
    return found


def _common(name: str, known: Mapping[str, str] = COMMON) -> str:
    if name not in known:
        raise Unreadable(name)
    return known[name]


def _text(string: str) -> str:
    try:
        return str(json.loads(string.removesuffix("i"), strict=False))
    except ValueError:  # an escape that JSON does not have
        raise Unreadable(string) from None


def _literal(string: str) -> str:
    escaped = SPECIAL.sub(r"\\\g<0>", _text(string)).replace("\n", r"\n").replace("\r", r"\r").replace("\t", r"\t")
    return f"(?i:{escaped})" if string.endswith("i") else escaped
