"""Files of the prefix cache: parts of KV caches, each file complete in itself and checked when it is read.

Arrays of one type and shape are stacked, so that a file (kv_cache/safetensors_files.py) has few of them. Its metadata
has the structure of the part, the indices of the arrays in each stack, and a checksum of it all and of the file's name.

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
from itertools import count
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

from mlx_lm.models import cache as mlx_caches

from mlxserver.engine.kv_cache import safetensors_files
from mlxserver.engine.kv_cache.caches import Cache
from mlxserver.engine.kv_cache.quantized import QuantizedCache
from mlxserver.engine.platform.pinned_memory import Buffer

FORMAT = 2
SUFFIX = ".safetensors"
PARTIAL = ".partial.safetensors"
_STACKED = 8  # arrays in a stack, most: of a long prompt, too, a stack stays below 2^31 values
_ROW = 1024  # words that are summed up for the checksum
_CLASSES = {**vars(mlx_caches), QuantizedCache.__name__: QuantizedCache}  # by name, of a layer
_numbers = count()


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
        safetensors_files.write(partial, stacks, metadata, buffer)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read(path: Path, buffer: Buffer | None = None) -> StoredPart:
    """The part in a file, evaluated; through a buffer if it is large enough. Raises OSError, CacheFileInvalid."""
    try:
        stacks, metadata = safetensors_files.read(path, buffer)
        described, checksum = metadata["part"], metadata["checksum"]
        structure, members = _parsed(described)
    except (ValueError, KeyError, TypeError) as error:
        raise CacheFileInvalid(path.name) from error
    if checksum != _checksum(path.name, described, stacks):
        raise CacheFileInvalid(path.name)
    return StoredPart(structure, members, stacks)


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
