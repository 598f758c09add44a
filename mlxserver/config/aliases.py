"""Patterns among the aliases of models, in fnmatch's notation: *, ?, [ab] and [!ab]; capitals count."""

from __future__ import annotations

import string
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache

ALPHABET = string.ascii_letters + string.digits + "._:/-"  # of keys and aliases


def is_pattern(alias: str) -> bool:
    """Whether an alias is a pattern of names."""
    return not {*alias}.isdisjoint("*?[")


def fits(name: str, alias: str) -> bool:
    """Whether a name fits an alias that is a pattern."""
    return is_pattern(alias) and fnmatchcase(name, alias)


def clash(first: str, second: str) -> bool:
    """Whether two aliases leave open which of them a name means: they are equal, or equally long and fit one name."""
    if first == second:
        return True
    return is_pattern(first) and is_pattern(second) and len(first) == len(second) and _overlap(first, second)


def _overlap(first: str, second: str) -> bool:
    """Whether some name fits both patterns."""
    a, b = [*_characters(first)], [*_characters(second)]

    @cache
    def rest_overlaps(i: int, j: int) -> bool:
        if i == len(a) and j == len(b):
            return True
        if i < len(a) and a[i] is None:
            return rest_overlaps(i + 1, j) or (j < len(b) and rest_overlaps(i, j + 1))
        if j < len(b) and b[j] is None:
            return rest_overlaps(i, j + 1) or (i < len(a) and rest_overlaps(i + 1, j))
        if i == len(a) or j == len(b):
            return False
        return bool((a[i] or set()) & (b[j] or set())) and rest_overlaps(i + 1, j + 1)

    return rest_overlaps(0, 0)


def _characters(pattern: str) -> Iterator[set[str] | None]:
    """The characters that fit each place of a pattern; None stands for a *."""
    start = 0
    while start < len(pattern):
        end = start + 1
        if pattern[start] == "[":
            closing = pattern.find("]", start + (3 if pattern[start + 1 : start + 2] == "!" else 2))
            end = closing + 1 if closing > 0 else end
        part = pattern[start:end]
        yield None if part == "*" else {one for one in {*ALPHABET, *pattern} if fnmatchcase(one, part)}
        start = end
