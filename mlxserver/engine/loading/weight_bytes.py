"""Bytes of a model's weights as they will be loaded, from its configuration and the sizes of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.platform.native.formats import has_kernel
from mlxserver.engine.platform.policy import ExecutionPolicy, WeightPolicy

Format = Mapping[str, Any]
_TYPE_BYTES = {"float32": 4}  # of a value; every other type that checkpoints state has two
_FEWER_BITS = 1.1  # times as large in 16 bits: weights that are stored in fewer


def weight_bytes(values: int, in_layers: int, stored: int, weights: WeightPolicy, config: Mapping[str, Any]) -> int:
    """Bytes of so many weights in their loaded format. stored: in their stored one. in_layers: see Architecture."""
    if weights is WeightPolicy.FLOAT32:
        return values * 4
    if weights is WeightPolicy.QUANTIZED:
        return _native_bytes(values, in_layers, stored, config)
    return values * 2 if weights is WeightPolicy.BFLOAT16 and has_fewer_bits(values, stored) else stored


def _native_bytes(values: int, in_layers: int, stored: int, config: Mapping[str, Any]) -> int:
    """Bytes of so many weights where native kernels compute with those of layers, and the others are float32.

    How many are quantized follows from the stored size. Where some have other bits than most, it is an upper bound.
    """
    width = _float_bytes(config)
    if width == 4:
        return min(stored, values * 4)
    floats: float = values
    if formats := _quantization(config):
        if not all(_has_kernel(part, formats[0]) for part in formats):
            return values * 4
        each = formats[0]["bits"] / 8 + 2 * width / formats[0]["group_size"]
        floats = max(0, stored - values * each) / (width - each)
    return min(values * 4, int(stored + min(floats, values - in_layers) * (4 - width)))


def _quantization(config: Mapping[str, Any]) -> Sequence[Format]:
    """The formats of quantized weights that a config.json states, the general one first; none without any."""
    stated = config.get("quantization") or config.get("quantization_config")
    return [stated, *(part for part in stated.values() if isinstance(part, Mapping))] if stated else []


def _has_kernel(format: Format, default: Format) -> bool:
    """Whether quantized weights that a config.json describes have a native kernel."""
    bits, group_size = (format.get(name, default.get(name)) for name in ("bits", "group_size"))
    return has_kernel(str(format.get("mode", default.get("mode", "affine"))), bits, group_size)


def has_fewer_bits(values: int, stored: int) -> bool:
    """Whether weights are stored in fewer than 16 bits."""
    return values * 2 > stored * _FEWER_BITS


def value_bytes(config: Mapping[str, Any], policy: ExecutionPolicy) -> int:
    """Bytes of a computed value."""
    return 4 if policy.weights.computes_in_float32 else _float_bytes(config)


def _float_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of a stored float."""
    return _TYPE_BYTES.get(str(_stated_type(config)), 2)


def _stated_type(config: Mapping[str, Any]) -> object:
    for part in (config, config.get("text_config") or {}):
        if stated := part.get("torch_dtype") or part.get("dtype"):
            return stated
    return None


def adapter_bytes(spec: ModelSpec) -> int:
    """Size of the adapter, which stays beside quantized weights."""
    if spec.adapter is None:
        return 0
    file = Path(spec.adapter).expanduser() / "adapters.safetensors"
    return file.stat().st_size if file.is_file() else 0
