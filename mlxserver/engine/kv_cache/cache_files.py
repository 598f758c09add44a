"""Files of the prefix cache: parts of KV caches, each file complete in itself and checked when it is read.

A file is in the safetensors format, which MLX writes and reads without Python's lock; where there is page-locked memory
(platform/pinned_memory.py), files go through it instead. Arrays of one type and shape are stacked, so that a file has
few of them. The metadata has the structure of the part, the indices of the arrays in each stack, and a checksum of it
all and of the file's name.

Rule: a file appears under its name by one rename, when it is whole. It is not synchronized: what a power failure
damages, the checksum finds.
"""

from __future__ import annotations

import functools
import json
import math
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, Never, cast

from mlxserver.engine.mlx import mx

from mlx_lm.models import cache as mlx_caches

from mlxserver.engine.kv_cache.caches import Cache
from mlxserver.engine.kv_cache.quantized import QuantizedCache
from mlxserver.engine.platform import pinned_memory
from mlxserver.engine.platform.pinned_memory import Buffer

FORMAT = 2
SUFFIX = ".safetensors"
PARTIAL = ".partial.safetensors"
_STACKED = 8  # arrays in a stack, most: of a long prompt, too, a stack stays below 2^31 values
_ROW = 1024  # words that are summed up for the checksum
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
_CLASSES = {**vars(mlx_caches), QuantizedCache.__name__: QuantizedCache}  # by name, of a layer
_numbers = count()

Loaded = tuple[dict[str, mx.array], dict[str, str]]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part as it is in a file. stacks: [arrays, *shape]. members: the indices of their arrays in `structure`."""

    structure: Sequence[Any]
    members: Sequence[Sequence[int]]
    stacks: Sequence[mx.array]


class CacheFileInvalid(Exception):
    """A file that is damaged, cut off, of another format, or of other content than its name says."""


class NotStorable(Exception):
    """A part with a layer that has no form on disk."""


def write(path: Path, part: Cache, buffer: Buffer | None = None) -> None:
    """Write a part to a new file, through a buffer if it is large enough. Raises OSError, NotStorable."""
    arrays: list[mx.array] = []
    structure = [_described(layer, arrays) for layer in part]
    members = list(_alike(arrays))
    stacks = [mx.stack([arrays[index] for index in own]) for own in members]
    described = json.dumps([structure, members])
    metadata = {"part": described, "checksum": _checksum(path.name, described, stacks)}
    partial = path.with_name(f"{path.stem}.{os.getpid()}-{threading.get_ident()}-{next(_numbers)}{PARTIAL}")
    try:
        if buffer and _fits(stacks, buffer):
            _save_through(buffer, partial, stacks, metadata)
        else:
            _save(partial, {str(number): stack for number, stack in enumerate(stacks)}, metadata)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _save(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    try:
        mx.save_safetensors(str(path), arrays, metadata)
    except RuntimeError as error:  # which MLX raises for a full disk, too
        raise OSError(str(error)) from error


def _save_through(buffer: Buffer, path: Path, stacks: Sequence[mx.array], metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for number, stack in enumerate(stacks):
        end = offset + stack.nbytes
        header[str(number)] = {"dtype": _NAMES[stack.dtype], "shape": stack.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("xb", buffering=0) as file:
        _write_all(file, memoryview(len(encoded).to_bytes(8, "little") + encoded))
        for places in _places([stack.nbytes for stack in stacks], buffer):
            mx.eval([buffer.download(stacks[number], start) for number, start in places if stacks[number].size])
            for number, start in places:
                _write_all(file, buffer.memory[start : start + stacks[number].nbytes])


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


def read(path: Path, buffer: Buffer | None = None) -> StoredPart:
    """The part in a file, evaluated; through a buffer if it is large enough. Raises OSError, CacheFileInvalid."""
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEADER)  # MLX reads it with Python's lock held: it must not have to wait for the disk
        try:
            arrays, metadata = (_load_through(buffer, file, head) if buffer else None) or _load(path)
            structure, members = _parsed(metadata["part"])
            stacks = [arrays[str(number)] for number in range(len(arrays))]
            checksum = metadata["checksum"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            path.stat()  # it may be gone, meanwhile
            raise CacheFileInvalid(path.name) from error
    if checksum != _checksum(path.name, metadata["part"], stacks):
        raise CacheFileInvalid(path.name)
    return StoredPart(structure, members, stacks)


def _load(path: Path) -> Loaded:
    return cast(Loaded, mx.load(str(path), format="safetensors", return_metadata=True))


def _load_through(buffer: Buffer, file: FileIO, head: bytes) -> Loaded | None:
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


def _fits(stacks: Sequence[mx.array], buffer: Buffer) -> bool:
    return max((stack.nbytes for stack in stacks), default=0) <= len(buffer.memory)


@functools.lru_cache(maxsize=64)
def _parsed(described: str) -> tuple[Sequence[Any], Sequence[Sequence[int]]]:
    """Structure and members, as the metadata has them: those of a prompt's blocks are alike."""
    structure, members = json.loads(described)
    return structure, members


def restored(stored: StoredPart) -> Cache:
    """The part that was stored. Its arrays are not evaluated: they are views of the stacks."""
    arrays = {
        index: stack[position : position + 1].squeeze(0)  # one by its number would be a copy
        for own, stack in zip(stored.members, stored.stacks, strict=True)
        for position, index in enumerate(own)
    }
    return [_layer(described, arrays) for described in stored.structure]


def _alike(arrays: Sequence[mx.array]) -> Iterator[list[int]]:
    """Indices of arrays that are stacked."""
    groups: dict[Any, list[int]] = {}
    for index, array in enumerate(arrays):
        groups.setdefault((array.dtype, array.shape), []).append(index)
    for group in groups.values():
        yield from (group[start : start + _STACKED] for start in range(0, len(group), _STACKED))


def _checksum(name: str, described: str, stacks: Sequence[mx.array]) -> str:
    """CRC-32 of a file's name and description, and a weighted sum of its content, which the device computes.

    Any damage within one row of words changes the sum, but for one case in 2^32; so do rows that are swapped.
    """
    text = f"{name} {described} {[(str(stack.dtype), stack.shape) for stack in stacks]}"
    sums = mx.concatenate([mx.zeros(1, mx.uint32), *[_row_sums(stack) for stack in stacks if stack.size]])
    weights = mx.arange(sums.size, dtype=mx.uint32) * 2654435761 | 1
    return f"{zlib.crc32(text.encode()):08x}{(sums * weights).sum().item():08x}"


def _row_sums(stack: mx.array) -> mx.array:
    """Sums of words, modulo 2^32."""
    flat = stack.reshape(-1)
    words = flat.view(mx.uint8).astype(mx.uint32) if flat.nbytes % 4 else flat.view(mx.uint32)
    return words.reshape(-1, math.gcd(words.size, _ROW)).sum(axis=1)


def _described(layer: Any, arrays: list[mx.array]) -> Any:
    """A layer as JSON. Its arrays are appended to `arrays`, and stand for their index there."""
    if layer is None:
        return None
    if hasattr(layer, "caches"):
        return {"layers": [_described(own, arrays) for own in layer.caches]}
    name = type(layer).__name__
    if _CLASSES.get(name) is not type(layer):
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


def _layer(described: Any, arrays: dict[int, mx.array]) -> Any:
    if described is None:
        return None
    if "layers" in described:
        return mlx_caches.CacheList(*[_layer(own, arrays) for own in described["layers"]])
    return _CLASSES[described["class"]].from_state(_state(described["state"], arrays))


def _state(described: Any, arrays: dict[int, mx.array]) -> Any:
    if isinstance(described, dict):
        return arrays[described["array"]]
    return [_state(item, arrays) for item in described] if isinstance(described, list) else described
