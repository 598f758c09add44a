"""Description of a source from its files: no weights are read, and nothing is asked of the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from mlxserver.engine.description import Description
from mlxserver.engine.loading import safetensors_header, sources
from mlxserver.engine.loading.checkpoint_files import read_object
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.metadata import (
    HEAD_KEYS,
    KV_HEAD_KEYS,
    LAYER_KEYS,
    WIDTH_KEYS,
    attention_heads,
    first_stated,
    read_config,
    stated_context,
    vocab_size,
)
from mlxserver.engine.loading.safetensors_header import PACKED_BITS

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
            header.count_weights(bits if isinstance(bits, int) and bits > 0 else PACKED_BITS) for header in headers
        ),
        quantization=f"Q{bits}" if bits else next(_types(headers), ""),
        context=stated_context(config),
        layers=first_stated([config], LAYER_KEYS),
        heads=attention_heads(config),
        kv_heads=first_stated([config], (*KV_HEAD_KEYS, *HEAD_KEYS)),
        width=first_stated([config], WIDTH_KEYS),
        vocab=vocab_size(config),
        stored_bytes=sum(file.stat().st_size for file in files),
        template=_template(directory),
        modified=(directory / "config.json").stat().st_mtime,
    )


def _header(file: Path) -> safetensors_header.Header:
    """The header of a file, with the arrays of a sound shape; without any if it can't be read."""
    try:
        header = safetensors_header.read(file)
    except (OSError, ValueError, RecursionError):
        return safetensors_header.Header({}, 0)
    sound = {
        name: array
        for name, array in header.arrays.items()
        if isinstance(array, dict) and isinstance(sizes := array.get("shape"), list) and {*map(type, sizes)} <= {int}
    }
    return replace(header, arrays=sound)


def _types(headers: list[safetensors_header.Header]) -> Iterator[str]:
    """The types of floats, that of the most weights first."""
    sizes: dict[str, int] = {}
    for header in headers:
        for array in header.arrays.values():
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
