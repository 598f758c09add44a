"""Capacity classes: which sequences share slots, or a batched cache, by their length in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

ClassOf = Callable[[int], int]

_LEAST = 256
_SHORT = 4096  # up to here there are two classes per power of two; beyond, where each is much memory, four
_COARSE_LEAST, _COARSE_RATIO = 2048, 8


def fine_class(tokens: int) -> int:
    """Capacity of a slot for so many tokens, one of few: less than half as long again, or a quarter if it is long."""
    power = 1 << (tokens - 1).bit_length()
    step = max(_LEAST, power // (4 if tokens <= _SHORT else 8))
    return -(-tokens // step) * step


def coarse_class(tokens: int) -> int:
    """Most tokens of the sequences that share a forward pass with one of so many tokens, where every class costs one.

    A step reads the weights once per class: for a batch of ordinary lengths there must be one class only.
    """
    most = _COARSE_LEAST
    while most < tokens:
        most *= _COARSE_RATIO
    return most


def grouped(items: Iterable[int], class_of: ClassOf) -> dict[int, list[int]]:
    """The items of each class, the lowest class first; items keep their order."""
    groups: dict[int, list[int]] = {}
    for item in items:
        groups.setdefault(class_of(item), []).append(item)
    return dict(sorted(groups.items()))
