"""Capacity classes: which sequences share slots, or a batched cache, by their length in tokens.

A class is named by the most tokens that a sequence of it may have; the capacity of its slots follows its longest one.
So short sequences, whose slots take little, hardly ever move, and classes and shapes are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

ClassOf = Callable[[int], int]

_LEAST = 256  # tokens of the smallest slot
_NARROW = 1024  # tokens of the sequences that always share a class
_SHORT = 4096  # up to here there are two classes per power of two; beyond, where each is much memory, four
_WIDE, _RATIO = 2048, 8  # least limit of the first wide class, and the ratio of the others
_COARSE = 8192  # tokens up to which a class has one capacity beside others, but for the smallest slots
_TOGETHER = 8  # sequences of a batch for which wide classes are made


def capacity_for(tokens: int) -> int:
    """Capacity of a slot for so many tokens, one of few: less than half as long again, or a quarter if it is long."""
    power = 1 << (tokens - 1).bit_length()
    step = max(_LEAST, power // (4 if tokens <= _SHORT else 8))
    return -(-tokens // step) * step


def narrow_class(tokens: int) -> int:
    """Class for so many tokens where a class costs little: a power of two."""
    return max(_NARROW, 1 << (tokens - 1).bit_length())


def coarse_capacity_for(tokens: int) -> int:
    """Capacity of a slot for so many tokens beside slots of other narrow classes: of fewer ones, but not of more memory
    where it is much. A step of several classes has a shape for each combination of theirs.
    """
    if tokens > _COARSE:
        return capacity_for(tokens)
    return _LEAST if tokens <= _LEAST else narrow_class(tokens)


def wide_classes(pass_tokens: int) -> ClassOf:
    """Classes for a forward pass each: the function from a number of tokens to the most tokens in its class.

    A step reads the weights once per class, so that there is one class only for all lengths at which the keys and
    values that padding adds to some sequences are less than that. pass_tokens: tokens of KV cache of as many bytes as
    the weights.
    """
    least = max(_WIDE, 1 << (pass_tokens // _TOGETHER).bit_length())

    def class_of(tokens: int) -> int:
        most = least
        while most < tokens:
            most *= _RATIO
        return most

    return class_of


def one_class(tokens: int) -> int:
    """The same class for all lengths."""
    return 0


def grouped(items: Iterable[int], class_of: ClassOf) -> dict[int, list[int]]:
    """The items of each class, the lowest class first; items keep their order."""
    groups: dict[int, list[int]] = {}
    for item in items:
        groups.setdefault(class_of(item), []).append(item)
    return dict(sorted(groups.items()))
