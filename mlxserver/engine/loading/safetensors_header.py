"""Header of a safetensors file: the arrays that it has. The weights are not read.

Format: github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKED_BITS = 32  # of a stored value of quantized weights
_LARGEST = 100 << 20  # bytes; a longer one is damaged


class HeaderInvalid(ValueError):
    """A file without room for the header that its first bytes state."""


@dataclass(frozen=True, slots=True)
class Header:
    """arrays: type, shape and place of each by its name, as the file states them. begin: of the data, in bytes."""

    arrays: Mapping[str, Any]
    begin: int

    def count_weights(self, bits: int) -> int:
        """Number of weights; those of quantized layers are packed, and their scales and biases are none."""
        packed = {name.removesuffix(".weight") for name, array in self.arrays.items() if array.get("dtype") == "U32"}
        total = 0
        for name, array in self.arrays.items():
            layer, _, kind = name.rpartition(".")
            if layer in packed and kind in ("scales", "biases"):
                continue
            size = math.prod(array["shape"])
            total += size * PACKED_BITS // bits if layer in packed and kind == "weight" else size
        return total


def read(file: Path) -> Header:
    """The header of a file. Raises OSError, HeaderInvalid, ValueError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size, _LARGEST):
            raise HeaderInvalid(f"{file.name} is cut short or no safetensors file")
        arrays = json.loads(stream.read(length))
    if not isinstance(arrays, dict):
        raise ValueError(f"the header of {file.name} is no object")
    arrays.pop("__metadata__", None)
    return Header(arrays, 8 + length)
