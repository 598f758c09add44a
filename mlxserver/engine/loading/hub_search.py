"""Search of the Hugging Face hub for models in MLX's format, with the sizes that its metadata state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelInfo, constants, errors, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

from mlxserver.engine.loading import hub
from mlxserver.engine.loading.errors import SearchFailed
from mlxserver.engine.loading.library.facts import RUNTIME_BYTES
from mlxserver.engine.loading.weight_bytes import weight_bytes
from mlxserver.engine.platform.policy import current

FILTER = "mlx"  # tag of the models that mlx-lm can load
FIELDS = ["safetensors", "config", "downloads", "likes", "lastModified", "gated", "tags"]
BITS = re.compile(r"(\d)-?bit", re.IGNORECASE)
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
GROUP_SIZE = 64  # of quantized weights by default
PACKED = "U32"  # type of arrays that hold several quantized weights per item


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub. Sizes and counts are None where its metadata do not state them; updated: ISO 8601.

    quantization: "4-bit"; None for an unquantized one. size_bytes: its weights as they are downloaded. needed_bytes:
    about what it takes in memory on this device, without KV cache.
    """

    id: str
    downloads: int
    likes: int
    updated: str | None
    gated: bool
    architecture: str | None
    quantization: str | None
    parameters: int | None
    size_bytes: int | None
    needed_bytes: int | None


def search(words: str, limit: int) -> list[HubModel]:
    """The models whose id has the words, those with the most downloads first. Blocks. Raises SearchFailed."""
    query = {"search": words, "filter": FILTER, "sort": "downloads", "limit": limit, "expand": FIELDS}
    try:  # not by HfApi, which asks a hub that can't be reached six times, and prints each
        response = get_session().get(
            f"{constants.ENDPOINT}/api/models",
            params=query,
            headers=build_hf_headers(),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        hf_raise_for_status(response)
        return [_model(ModelInfo(**{"siblings": None, **each})) for each in response.json()[:limit]]
    except (httpx.TransportError, errors.OfflineModeIsEnabled):
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise SearchFailed(words, f"the Hugging Face hub ({constants.ENDPOINT}) can't be reached{offline}") from None
    except Exception as error:
        raise SearchFailed(words, hub.failure(words, error, None).expected) from None


def _model(info: Any) -> HubModel:
    config: Mapping[str, Any] = info.config or {}
    bits = _bits(info.id, config, info.tags or ())
    counts: Mapping[str, int] = info.safetensors.parameters if info.safetensors else {}
    size = sum(count * ITEM_BYTES.get(kind, 1) for kind, count in counts.items()) or None
    weights = sum(count * 32 // bits if bits and kind == PACKED else count for kind, count in counts.items()) or None
    held = weights and size and weight_bytes(weights, weights, size, current().weights, _config(config, counts, bits))
    return HubModel(
        info.id,
        info.downloads or 0,
        info.likes or 0,
        info.last_modified.isoformat() if info.last_modified else None,
        bool(info.gated),
        config.get("model_type"),
        f"{bits}-bit" if bits else None,
        weights,
        size,
        held and held + RUNTIME_BYTES,
    )


def _config(config: Mapping[str, Any], counts: Mapping[str, int], bits: int | None) -> dict[str, Any]:
    """A config.json with the type and the quantization of the weights, as far as the hub states them."""
    floats = {kind: count for kind, count in counts.items() if kind in TYPES}
    stated = config.get("quantization_config") or config.get("quantization") or {}
    format = {"group_size": GROUP_SIZE, **stated, "bits": bits}
    return {
        "torch_dtype": TYPES[max(floats, key=lambda kind: floats[kind])] if floats else None,
        "quantization": format if bits else None,
    }


def _bits(id: str, config: Mapping[str, Any], tags: Any) -> int | None:
    """Bits per weight, as the configuration, a tag or the name state them."""
    stated = (config.get("quantization_config") or config.get("quantization") or {}).get("bits")
    named = (BITS.search(text) for text in (*tags, id))
    return stated or next((int(match[1]) for match in named if match and int(match[1])), None)
