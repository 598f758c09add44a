"""Header of a GGUF file: its fields, without the vocabulary, and sizes of its tensors. The weights are not read.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import collections
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
LONGEST_LIST = 1024  # items of an array that is kept; the vocabulary is longer
MOST_ITEMS = 10**7  # of fields, tensors and strings: a file with more is damaged
MOST_DIMENSIONS = 8  # of a tensor; the format has four
ALIGNMENT = 32  # bytes, unless the file states another


@dataclass(frozen=True, slots=True)
class Header:
    """fields: by name, without long arrays. elements: number of weights by their type. end: size of the whole file."""

    fields: dict[str, Any]
    elements: Mapping[str, int]
    end: int

    @property
    def main_type(self) -> str:
        """The type that most weights have."""
        return max(self.elements, key=lambda name: self.elements[name], default="unknown")


def read(path: Path) -> Header:
    """The header of a GGUF file. Raises ValueError if it is damaged, OSError."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it is no GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).header()
            except (struct.error, IndexError, KeyError, UnicodeDecodeError):
                raise ValueError("its header is cut short or damaged") from None


class _Reader:
    """Reader of a header from its beginning. Raises struct.error beyond the end, ValueError for what can't be."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._place = len(MAGIC)

    def header(self) -> Header:
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its GGUF version {version} is not known")
        tensors, fields = self._count(), self._count()
        named = {self._string(): self._value(self._number("I")) for _ in range(fields)}
        return self._with_tensors({name: value for name, value in named.items() if value is not None}, tensors)

    def _with_tensors(self, fields: dict[str, Any], tensors: int) -> Header:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        elements: collections.Counter[str] = collections.Counter()
        last = 0
        for _ in range(tensors):
            self._string()
            count = 1
            if (dimensions := self._number("I")) > MOST_DIMENSIONS:
                raise ValueError("its header is damaged")
            for _ in range(dimensions):
                count *= self._number("Q")
            kind = self._number("I")
            try:
                block, bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except ValueError:
                raise ValueError(f"its tensor type {kind} is not known") from None
            elements[GGMLQuantizationType(kind).name] += count
            last = max(last, self._number("Q") + count // block * bytes)
        alignment = int(fields.get("general.alignment", ALIGNMENT)) or ALIGNMENT
        begin = -(-self._place // alignment) * alignment
        return Header(fields, elements, begin + last)

    def _value(self, kind: int) -> Any:
        """The value of a field; None for a long array."""
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._number(FORMATS[kind])
        of, count = self._number("I"), self._count()
        if of == STRING:
            return self._skip_strings(count)
        if of == ARRAY:
            raise ValueError("its header has lists of lists")
        if count > LONGEST_LIST:
            self._place += count * struct.calcsize(FORMATS[of])
            return None
        return [self._number(FORMATS[of]) for _ in range(count)]

    def _skip_strings(self, count: int) -> None:
        for _ in range(count):
            self._place += 8 + int(struct.unpack_from("<Q", self._data, self._place)[0])

    def _string(self) -> str:
        length = self._number("Q")
        begin, self._place = self._place, self._place + length
        if self._place > len(self._data):
            raise ValueError("its header is cut short or damaged")
        return self._data[begin : self._place].decode()

    def _count(self) -> int:
        if (count := self._number("Q")) > MOST_ITEMS:
            raise ValueError("its header is damaged")
        return int(count)

    def _number(self, format: str) -> Any:
        (value,) = struct.unpack_from(f"<{format}", self._data, self._place)
        self._place += struct.calcsize(format)
        return value
