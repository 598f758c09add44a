"""Quantised keys and values of a model: whether its cache can have them, found out before its weights are read."""

from __future__ import annotations

from typing import Any

from mlxserver.engine.mlx import mx

from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mlxserver.config.settings import KV_GROUP_SIZES, ModelSpec
from mlxserver.engine.kv_cache import ragged
from mlxserver.engine.kv_cache.caches import flat, new_cache, set_kv_format
from mlxserver.engine.kv_cache.quantized import KVFormat
from mlxserver.engine.loading.unsupported import Unsupported


def kv_format(spec: ModelSpec) -> KVFormat | None:
    """The format that the settings ask for; None for keys and values as they are computed."""
    return KVFormat(spec.kv_bits, spec.kv_group_size) if spec.kv_bits else None


def quantize_kv(model: Any, kv: KVFormat | None) -> None:
    """Have a model keep its keys and values in a format. Steps are built, not computed.

    Raises:
        Unsupported: it has none, or other ones too (sliding windows), or computes with them itself (MLA).
    """
    if kv is None:
        return
    layers = list(flat(make_prompt_cache(model)))
    others = {type(layer).__name__ for layer in layers if not isinstance(layer, KVCache | ArraysCache)}
    if others:
        raise _refusal(
            kv, f"some of its layers do not keep all tokens ({', '.join(sorted(others))}), and can't be quantised"
        )
    if not any(isinstance(layer, KVCache) for layer in layers):
        raise _refusal(kv, "it keeps states, and no keys and values")
    _check_dimensions(model, kv)
    ragged.bind()
    set_kv_format(model, kv)
    try:
        cache = new_cache(model)
        for tokens in (1, 2, 1):
            model(mx.zeros((1, tokens), dtype=mx.uint32), cache=cache)
    except Exception as error:  # of any kind: it is foreign code, given what it may not know
        set_kv_format(model, None)
        raise _refusal(kv, "its attention can't read quantised keys and values") from error


def _check_dimensions(model: Any, kv: KVFormat) -> None:
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 1), dtype=mx.uint32), cache=cache)
    arrays = [(layer.keys, layer.values) for layer in flat(cache) if isinstance(layer, KVCache)]
    for dimensions in sorted({array.shape[3] for pair in arrays for array in pair if array is not None}):
        if dimensions % kv.group_size:
            fitting = [str(size) for size in KV_GROUP_SIZES if dimensions % size == 0]
            expected = f"expected {' or '.join(fitting)}" if fitting else "no group fits, so leave kv_bits out"
            raise Unsupported(
                f"kv_group_size is {kv.group_size}, but its keys or values have {dimensions} dimensions; {expected}"
            )


def _refusal(kv: KVFormat, reason: str) -> Unsupported:
    return Unsupported(f"kv_bits is {kv.bits}, but {reason}; leave kv_bits out")
