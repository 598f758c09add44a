"""Description of a source from its files: no weights are read, and nothing is asked of the network."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxserver.engine.description import Description
from mlxserver.engine.errors import SourceInvalid
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.checkpoint_files import read_object
from mlxserver.engine.loading.metadata import CONTEXT_KEYS, HEAD_KEYS, read_config, text_configs

PACKED_BITS = 32  # of a stored value of quantized weights
LONGEST_HEADER = 100 << 20  # bytes; a longer one is damaged
TYPES = {"F64", "F32", "F16", "BF16"}


def describe(source: str) -> Description:
    """What the files of a source state; an empty description where there are none here yet. Blocks to read them."""
    try:
        directory = sources.local_directory(source)
        config = read_config(directory / "config.json") if directory else {}
    except (SourceInvalid, OSError, ValueError):
        return Description()
    if directory is None:
        return Description()
    files = sorted(directory.glob("model*.safetensors"))
    headers = [_header(file) for file in files]
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    bits = quantization.get("bits") if isinstance(quantization, Mapping) else None
    return Description(
        architecture=str(config.get("model_type") or ""),
        parameters=sum(
            _count(header, bits if isinstance(bits, int) and bits > 0 else PACKED_BITS) for header in headers
        ),
        quantization=f"Q{bits}" if bits else next(_types(headers), ""),
        context=_first(config, *CONTEXT_KEYS),
        layers=_first(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers"),
        heads=_first(config, *HEAD_KEYS),
        kv_heads=_first(config, "num_key_value_heads", "n_kv_heads", *HEAD_KEYS),
        width=_first(config, "hidden_size", "n_embd", "d_model", "dim"),
        vocab=_first(config, "vocab_size"),
        stored_bytes=sum(file.stat().st_size for file in files),
        template=_template(directory),
        modified=(directory / "config.json").stat().st_mtime,
    )


def _first(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that is a count, in the configuration or that of its text model."""
    values = (part.get(name) for part in text_configs(config) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: type and shape of each array; empty if it can't be read."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            content = json.loads(stream.read(length)) if length <= LONGEST_HEADER else {}
    except (OSError, ValueError, struct.error, RecursionError):
        return {}
    arrays = content if isinstance(content, dict) else {}
    return {name: value for name, value in arrays.items() if isinstance(value, dict) and _is_shape(value.get("shape"))}


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int for size in value)


def _count(header: Mapping[str, Any], bits: int) -> int:
    """Weights in a file; those of quantized layers are packed, and their scales and biases are none."""
    packed = {name.removesuffix(".weight") for name, array in header.items() if array.get("dtype") == "U32"}
    total = 0
    for name, array in header.items():
        layer, _, kind = name.rpartition(".")
        if layer in packed and kind in ("scales", "biases"):
            continue
        size = math.prod(array["shape"])
        total += size * PACKED_BITS // bits if layer in packed and kind == "weight" else size
    return total


def _types(headers: list[dict[str, Any]]) -> Iterator[str]:
    """The types of floats, that of the most weights first."""
    sizes: dict[str, int] = {}
    for header in headers:
        for array in header.values():
            if (name := str(array.get("dtype"))) in TYPES:
                sizes[name] = sizes.get(name, 0) + math.prod(array["shape"])
    yield from sorted(sizes, key=lambda name: -sizes[name])


def _template(directory: Path) -> str:
    """The chat template, from its own file or the tokenizer's configuration; of several the default one."""
    try:
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    try:
        stated = (read_object(directory / "tokenizer_config.json") or {}).get("chat_template")
    except ValueError:
        return ""
    if isinstance(stated, list):
        named = {one.get("name"): one.get("template") for one in stated if isinstance(one, dict)}
        stated = named.get("default")
    return stated if isinstance(stated, str) else ""
