"""Conversion of GGUF files that keeps their 4- and 8-bit blocks and 16-bit floats, without loss, for native kernels.

A block's weights are scale * code + bias in groups of 32, which is MLX's affine format. gguf2mlx keeps Q4_K and Q8_0
with scales of 16 bits, which rounds those of Q4_K, and makes float16 of all else. Here Q4_0 and Q4_1 are kept, too,
scales of Q4_K are float32, and so is what is not kept (Q6_K has other scales within 32 weights), except matrices whose
values all have 16 bits (F16, BF16).
Format: github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf2mlx import gguf2mlx as converter
from gguf2mlx.quantize import gguf_codes as codes
from gguf2mlx.quantize.gguf_codes import MappingResult
from gguf2mlx.streaming import StreamingShardWriter

_Array = np.ndarray[Any, Any]
GROUP = 32
_TYPES = {"Q4_0": (2, 18), "Q4_1": (3, 20)}  # their numbers in a file, and bytes of a block


def _q4(raw: _Array, shape: tuple[int, int], name: str) -> MappingResult:
    """A tensor of Q4_0 or Q4_1 blocks: scale and, of Q4_1, least value in float16, then 32 codes in 16 bytes, the first
    half of them in the lower bits. Of Q4_0 the least value is -8 times the scale.
    """
    rows, columns = shape
    blocks = np.ascontiguousarray(raw).reshape(-1).view(np.uint8).reshape(-1, _TYPES[name][1])
    scales = blocks[:, :2].copy().view("<f2").reshape(rows, columns // GROUP)
    least = blocks[:, 2:4].copy().view("<f2").reshape(scales.shape) if name == "Q4_1" else scales * np.float16(-8)
    packed = blocks[:, -16:]
    values = np.concatenate([packed & 15, packed >> 4], axis=1).reshape(rows, columns)
    return MappingResult(
        packed=codes.pack_codes(values, 4),
        scales=scales,
        biases=least,
        bits=4,
        group_size=GROUP,
        qtype=name,
        exact=True,
    )


def extend() -> None:
    """Have the converter of this process keep these blocks, matrices in 16 bits, and all other weights in float32."""
    for name, (number, size) in _TYPES.items():
        codes._BLOCK_ELEMENTS[name], codes._TYPE_BYTES[name], codes._AFFINE_BITS[name] = GROUP, size, 4
        codes.QTYPE_IDS[name], codes._NAME_BY_ID[number] = number, name
        codes._MAPPERS[name] = lambda raw, shape, floating_dtype, name=name: _q4(raw, shape, name)
    codes._MAPPERS["Q4_K"] = lambda raw, shape, floating_dtype: codes.q4_k_to_affine(
        raw, shape, floating_dtype="float32"
    )
    del codes._AFFINE_BITS["Q6_K"], codes._NAME_BY_ID[codes.QTYPE_IDS["Q6_K"]]
    decode, convert, preserve = converter._decode_tensor_to_array, converter.build_config, converter._convert_preserved
    converter._decode_tensor_to_array = lambda tensor, dtype, name: decode(tensor, "float32", name)
    converter.build_config = lambda reader, arch, dtype="float16", **options: convert(
        reader, arch, "float32", **options
    )
    converter._convert_preserved = lambda path, *rest, **options: has_blocks(path) and preserve(path, *rest, **options)
    converter.StreamingShardWriter = _Writer


def has_blocks(path: str) -> bool:
    """Whether a GGUF file has blocks that are kept."""
    return any(codes.qtype_name(tensor.tensor_type) for tensor in converter.GGUFReader(path).tensors)


class _Writer(StreamingShardWriter):  # type: ignore[misc]
    """Writer of weights that writes a float32 matrix in 16 bits if no value of it has more."""

    def add(self, name: str, array: _Array, *, dtype: str | None = None) -> None:
        if array.dtype == np.float32 and array.ndim > 1:
            if _is_bfloat16(array):
                dtype = "bfloat16"
            elif _is_float16(array):
                array = array.astype(np.float16)
        super().add(name, array, dtype=dtype)


def _is_bfloat16(array: _Array) -> bool:
    """Whether float32 values are ones of bfloat16; the first row is looked at first."""
    return not any((part.view(np.uint32) & 0xFFFF).any() for part in (array[:1], array))


def _is_float16(array: _Array) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return all(np.array_equal(part.astype(np.float16).astype(np.float32), part) for part in (array[:1], array))
