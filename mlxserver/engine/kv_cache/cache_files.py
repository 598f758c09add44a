"""Files of the prefix cache: parts of KV caches, each file complete in itself and checked when it is read.

A file is a magic number, the length of its header and the header's CRC-32; the header, JSON; and the arrays' bytes, one
after the other. The header has the file's name, the structure of the part, and of each array its type, its shape and
its CRC-32.

Rule: a file appears under its name by one rename, when it is whole. It is not synchronized: what a power failure
damages, the checksums find.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

import numpy as np
from mlx_lm.models import cache as mlx_caches

from mlxserver.engine.kv_cache.caches import Cache

FORMAT = 1
SUFFIX = ".kv"
PARTIAL = ".partial"
_MAGIC = b"mlxkvpc" + bytes([FORMAT])
_HEAD = struct.Struct("<8sII")
_numbers = count()

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array as its bytes."""

    content: mx.array
    dtype: mx.Dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part as it is in a file."""

    structure: Sequence[Any]
    arrays: Sequence[StoredArray]


class CacheFileInvalid(Exception):
    """A file that is damaged, cut off, of another format, or of other content than its name says."""


class NotStorable(Exception):
    """A part with a layer that has no form on disk."""


def write(path: Path, part: Cache) -> int:
    """Write a part to a new file. Returns its size in bytes. Raises OSError, NotStorable."""
    arrays: list[mx.array] = []
    structure = [_described(layer, arrays) for layer in part]
    contents = [_bytes_of(array) for array in arrays]
    described = [
        {"type": str(array.dtype).rpartition(".")[2], "shape": array.shape, "crc": zlib.crc32(content.data)}
        for array, content in zip(arrays, contents, strict=True)
    ]
    header = json.dumps({"name": path.name, "structure": structure, "arrays": described}).encode()
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}-{next(_numbers)}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(_HEAD.pack(_MAGIC, len(header), zlib.crc32(header)) + header)
            for content in contents:
                file.write(content.data)
            size = file.tell()
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return size


def read(path: Path) -> StoredPart:
    """The part in a file. May be called on a thread without an MLX stream. Raises OSError, CacheFileInvalid."""
    data = np.fromfile(path, dtype=np.uint8)
    try:
        magic, length, crc = _HEAD.unpack(data[: _HEAD.size].tobytes())
        text = data[_HEAD.size : _HEAD.size + length].tobytes()
        if magic != _MAGIC or len(text) != length or zlib.crc32(text) != crc:
            raise CacheFileInvalid(path.name)
        header = json.loads(text)
        if header["name"] != path.name:
            raise CacheFileInvalid(path.name)
        arrays, start = [], _HEAD.size + length
        for described in header["arrays"]:
            dtype = getattr(mx, described["type"])
            end = start + int(np.prod(described["shape"])) * dtype.size
            content = data[start:end]
            if len(content) != end - start or zlib.crc32(content.data) != described["crc"]:
                raise CacheFileInvalid(path.name)
            arrays.append(StoredArray(mx.array(content), dtype, tuple(described["shape"])))
            start = end
        if start != len(data):
            raise CacheFileInvalid(path.name)
        return StoredPart(header["structure"], arrays)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheFileInvalid(path.name) from error


def restored(stored: StoredPart) -> Cache:
    """The part that was stored. Its arrays are not evaluated. Raises CacheFileInvalid."""
    try:
        arrays = [array.content.view(array.dtype).reshape(array.shape) for array in stored.arrays]
        return [_layer(described, arrays) for described in stored.structure]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CacheFileInvalid(str(error)) from error


def _bytes_of(array: mx.array) -> Bytes:
    flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
    mx.eval(flat)
    return np.array(flat, copy=False)


def _described(layer: Any, arrays: list[mx.array]) -> Any:
    """A layer as JSON. Its arrays are appended to `arrays`, and stand for their index there."""
    if layer is None:
        return None
    if hasattr(layer, "caches"):
        return {"layers": [_described(own, arrays) for own in layer.caches]}
    name = type(layer).__name__
    if getattr(mlx_caches, name, None) is not type(layer):
        raise NotStorable(name)
    return {"class": name, "state": _described_state(layer.state, arrays)}


def _described_state(state: Any, arrays: list[mx.array]) -> Any:
    match state:
        case mx.array():
            arrays.append(state)
            return {"array": len(arrays) - 1}
        case list() | tuple():
            return [_described_state(item, arrays) for item in state]
        case None | bool() | int() | float() | str():
            return state
    raise NotStorable(type(state).__name__)


def _layer(described: Any, arrays: Sequence[mx.array]) -> Any:
    if described is None:
        return None
    if "layers" in described:
        return mlx_caches.CacheList(*[_layer(own, arrays) for own in described["layers"]])
    kind = getattr(mlx_caches, described["class"])
    return kind.from_state(_state(described["state"], arrays))


def _state(described: Any, arrays: Sequence[mx.array]) -> Any:
    if isinstance(described, dict):
        return arrays[described["array"]]
    return [_state(item, arrays) for item in described] if isinstance(described, list) else described
