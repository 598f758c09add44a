"""Parts of gguf2mlx that take long, replaced by fast ones with the same results.

They are the reading of the vocabulary, codes that are packed as words of 32 bits, and the comparison of the result with
the file, by few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import quants
from gguf2mlx import gguf2mlx as converter
from gguf2mlx.quantize import gguf_codes as codes

from mlxserver.engine.loading.gguf_reader import Reader

_Array = np.ndarray[Any, Any]
_pack: Callable[[_Array, int], _Array] = codes.pack_codes
_unpack: Callable[[_Array, int, int], _Array] = codes.unpack_codes
_GROUP_BYTES = 1 << 20  # of decoded rows, which stay in a cache from one operation to the next


def hasten() -> None:
    """Replace the slow parts of the converter, in this process."""
    converter.GGUFReader = Reader
    codes.pack_codes, codes.unpack_codes, codes.affine_decode = pack, unpack, decode
    quants._apply_over_grouped_rows = _by_groups


def pack(values: _Array, bits: int) -> _Array:
    """Codes [rows, columns] in words of 32 bits, the first one in the lowest bits, as MLX has them. bits: 4, 6 or 8."""
    values = np.ascontiguousarray(values, np.uint8)
    if bits == 6:
        return _pack(values, bits)
    return (values if bits == 8 else values[:, ::2] | values[:, 1::2] << 4).view("<u4")


def unpack(packed: _Array, bits: int, columns: int) -> _Array:
    """The codes [rows, columns] that pack() has packed."""
    if bits == 6:
        return _unpack(packed, bits, columns)
    values = np.ascontiguousarray(packed, "<u4").view(np.uint8)
    return values if bits == 8 else np.stack([values & 15, values >> 4], axis=-1).reshape(-1, columns)


def decode(packed: _Array, scales: _Array, biases: _Array, bits: int, group_size: int = 32) -> _Array:
    """The weights [rows, columns] in float32 of codes with a scale and a bias per group."""
    rows, groups = scales.shape
    weights = unpack(packed, bits, groups * group_size).reshape(rows, groups, group_size).astype(np.float32)
    weights *= scales.astype(np.float32)[..., None]
    weights += biases.astype(np.float32)[..., None]
    return weights.reshape(rows, -1)


def _by_groups(func: Callable[[_Array], _Array], arr: _Array, otype: Any, oshape: tuple[int, ...]) -> _Array:
    """func(rows) for all rows of an array, some at a time."""
    rows = arr.reshape(-1, arr.shape[-1])
    out = np.empty((len(rows), oshape[-1]), otype)
    step = max(1, _GROUP_BYTES // max(1, out[:1].nbytes))
    for first in range(0, len(rows), step):
        out[first : first + step] = func(rows[first : first + step])
    return out.reshape(oshape)
