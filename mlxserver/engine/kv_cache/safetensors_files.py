"""Files in the safetensors format: arrays that are named by their numbers, and metadata.

Where there is page-locked memory (platform/pinned_memory.py), they go through a buffer in it, or else MLX writes and
reads them. Neither holds Python's lock for long.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Never, cast

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import pinned_memory
from mlxserver.engine.platform.pinned_memory import Buffer

_HEADER = 1 << 16  # bytes: what has the header, nearly always
_LARGEST_HEADER = 100 << 20  # bytes; a longer one is damaged
_TYPES = {  # names in safetensors files
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}

Loaded = tuple[dict[str, mx.array], dict[str, str]]


def write(path: Path, arrays: Sequence[mx.array], metadata: dict[str, str], buffer: Buffer | None = None) -> None:
    """Write a new file, through a buffer if it is large enough. Raises OSError."""
    if buffer and max((array.nbytes for array in arrays), default=0) <= len(buffer.memory):
        _write_through(buffer, path, arrays, metadata)
        return
    try:
        mx.save_safetensors(str(path), {str(number): array for number, array in enumerate(arrays)}, metadata)
    except RuntimeError as error:  # which MLX raises for a full disk, too
        raise OSError(str(error)) from error


def _write_through(buffer: Buffer, path: Path, arrays: Sequence[mx.array], metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for number, array in enumerate(arrays):
        end = offset + array.nbytes
        header[str(number)] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("xb", buffering=0) as file:
        _write_all(file, memoryview(len(encoded).to_bytes(8, "little") + encoded))
        for places in _places([array.nbytes for array in arrays], buffer):
            mx.eval([buffer.download(arrays[number], start) for number, start in places if arrays[number].size])
            for number, start in places:
                _write_all(file, buffer.memory[start : start + arrays[number].nbytes])


def _write_all(file: FileIO, content: memoryview) -> None:
    while len(content):
        content = content[file.write(content) :]


def _places(sizes: Sequence[int], buffer: Buffer) -> Iterator[list[tuple[int, int]]]:
    """Where arrays of these bytes are in a buffer, number and start, as many at a time as it has room for."""
    places, start = list[tuple[int, int]](), 0
    for number, nbytes in enumerate(sizes):
        if places and start + nbytes > len(buffer.memory):
            yield places
            places, start = [], 0
        places.append((number, start))
        start += pinned_memory.aligned(nbytes)
    yield places


def read(path: Path, buffer: Buffer | None = None) -> tuple[list[mx.array], dict[str, str]]:
    """The arrays of a file and its metadata; through a buffer if it is large enough. MLX reads them when they are
    evaluated.

    Raises OSError, and ValueError for a damaged file.
    """
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEADER)  # MLX reads it with Python's lock held: it must not have to wait for the disk
        try:
            arrays, metadata = (_read_through(buffer, file, head) if buffer else None) or _load(path)
            return [arrays[str(number)] for number in range(len(arrays))], metadata
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            path.stat()  # it may be gone, meanwhile
            raise ValueError(f"{path.name} is damaged") from error


def _load(path: Path) -> Loaded:
    return cast(Loaded, mx.load(str(path), format="safetensors", return_metadata=True))


def _read_through(buffer: Buffer, file: FileIO, head: bytes) -> Loaded | None:
    """What a file has, evaluated; None if an array is larger than the buffer.

    Raises ValueError, KeyError, TypeError, AttributeError for a damaged one.
    """
    length = int.from_bytes(head[:8], "little")
    if length > min(os.fstat(file.fileno()).st_size, _LARGEST_HEADER):
        raise ValueError("no header")
    while len(head) < 8 + length:
        head += file.read(8 + length - len(head)) or _cut_short()
    header = json.loads(head[8 : 8 + length])
    metadata = header.pop("__metadata__")
    stated = [_Stated.of(name, own) for name, own in header.items()]
    if max((own.nbytes for own in stated), default=0) > len(buffer.memory):
        return None
    arrays: dict[str, mx.array] = {}
    for places in _places([own.nbytes for own in stated], buffer):
        for number, start in places:
            own = stated[number]
            _read_all(file, buffer.memory[start : start + own.nbytes], 8 + length + own.begin)
            arrays[own.name] = (
                buffer.upload(start, own.shape, own.dtype) if own.nbytes else mx.zeros(own.shape, own.dtype)
            )
        mx.eval([arrays[stated[number].name] for number, _ in places])
    return arrays, metadata


@dataclass(frozen=True, slots=True)
class _Stated:
    """An array as a header states it. begin: of its bytes, behind the header."""

    name: str
    dtype: mx.Dtype
    shape: Sequence[int]
    begin: int
    nbytes: int

    @staticmethod
    def of(name: str, stated: dict[str, Any]) -> _Stated:
        """Raises ValueError for one that can't be."""
        dtype, shape, (begin, end) = _TYPES[stated["dtype"]], stated["shape"], stated["data_offsets"]
        if math.prod(shape) * dtype.size != end - begin or min([begin, *shape]) < 0:
            raise ValueError("an array of another size")
        return _Stated(name, dtype, shape, begin, end - begin)


def _read_all(file: FileIO, place: memoryview, offset: int) -> None:
    while len(place):
        count = os.preadv(file.fileno(), [place], offset) or _cut_short()
        place, offset = place[count:], offset + count


def _cut_short() -> Never:
    raise ValueError("a file that is cut short")
