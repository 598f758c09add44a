"""Facts of a model on this machine, from the headers of its files: its weights are never read.

Rule: what can't be loaded here raises Unusable, with the reason in words; no other error leaves read_facts().
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlxserver.config.settings import Kind
from mlxserver.engine.loading import gguf, kinds, metadata, safetensors_header
from mlxserver.engine.loading.library import gguf_header
from mlxserver.engine.loading.weight_bytes import weight_bytes
from mlxserver.engine.platform.policy import WeightPolicy, current

Format = Literal["mlx", "gguf"]
INDEX = "model.safetensors.index.json"
_STATED = ("torch_dtype", "dtype", "text_config", "quantization", "quantization_config")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")
RUNTIME_BYTES = 256 << 20  # of a loaded model beside weights and KV cache: activations, its tokenizer
# GGUF architectures that the converter takes (tests compare them with its own table).
CONVERTIBLE = {
    *("deepseek2", "deepseek3", "gemma", "gemma2", "gemma3", "gemma4", "glm-dsa", "glm4moe", "llama", "mistral"),
    *("phi3", "phi4", "qwen2", "qwen2_vl", "qwen2moe", "qwen2vl", "qwen3", "qwen3.5", "qwen3.6", "qwen3.8"),
    *("qwen35", "qwen36", "qwen38", "qwen3_5", "qwen3_6", "qwen3_8", "qwen3_vl", "qwen3moe", "qwen3vl", "stablelm"),
}


class Unusable(Exception):
    """A model that can't be loaded: damaged, not complete, or of another kind."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of a checkpoint. quantization: "4-bit", "Q4_K", "bfloat16". parameters: number of weights.

    context_length: tokens, None if not stated. kv_values: values in the KV cache per token. stored_bytes: the weights
    in their stored format; of a GGUF file, in the one that it is converted to. config: what config.json states of
    their type and quantization.
    """

    format: Format
    architecture: str
    quantization: str
    parameters: int
    context_length: int | None
    kv_values: int
    stored_bytes: int
    kind: Kind = "text"
    config: Mapping[str, Any] = field(default_factory=dict)

    def needed_bytes(self, weights: WeightPolicy, tokens: int) -> int:
        """About what the loaded model takes, with the KV cache of so many tokens; a load estimates it closely."""
        held = weight_bytes(self.parameters, self.parameters, self.stored_bytes, weights, self.config)
        each = 4 if weights.computes_in_float32 else 2
        return held + self.kv_values * min(tokens, self.context_length or tokens) * each + RUNTIME_BYTES


def read_facts(path: Path) -> Facts:
    """Facts of an MLX directory or a GGUF file. Raises Unusable."""
    try:
        return _directory_facts(path) if path.is_dir() else _gguf_facts(path)
    except Unusable:
        raise
    except OSError as error:
        raise Unusable(f"it can't be read: {error.strerror or error}") from None
    except Exception as error:  # damaged files can make a reader raise anything
        raise Unusable(f"it is damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


# -- MLX directories --------------------------------------------------------------------------------------------------


def _directory_facts(path: Path) -> Facts:
    if not (path / "config.json").is_file():
        raise Unusable("config.json is missing")
    config = metadata.read_config(path / "config.json")
    architecture = config.get("model_type")
    if not isinstance(architecture, str):
        raise Unusable("its config.json states no model_type")
    kind = kinds.kind_of(path, config)
    if not _is_known(architecture, kind):
        raise Unusable(_WITHOUT[kind].format(architecture))
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise Unusable("it has no tokenizer")
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    bits = quantization.get("bits")
    files = _weight_files(path)
    return Facts(
        "mlx",
        architecture,
        f"{bits}-bit" if bits else _stated_type(config, quantization),
        sum(_parameters(file, bits) for file in files),
        metadata.stated_context(config) or None,
        _kv_values(config) if kind in ("text", "vision") else 0,
        sum(file.stat().st_size if kind == "vision" else metadata.text_bytes(file) for file in files),
        kind,
        {name: config[name] for name in _STATED if name in config},
    )


_WITHOUT: dict[Kind, str] = {
    "text": "mlx-lm has no architecture {!r}",
    "vision": "mlx-vlm has no model that sees of the type {!r}",
    "embedding": "mlx-vlm has no embedding model of the type {!r}",
    "rerank": "mlx-vlm has no reranker of the type {!r}",
}


def _is_known(architecture: str, kind: Kind) -> bool:
    if kind == "embedding":
        return architecture in kinds.EMBEDDERS
    if kind == "rerank":
        return architecture in kinds.RERANKERS
    if kind == "vision":
        return architecture in kinds.SEEING
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return True  # nothing can be loaded here, and not for this reason
    models = Path(spec.submodule_search_locations[0]) / "models"
    if architecture.isidentifier() and (models / f"{architecture}.py").is_file():
        return True
    import mlxserver.engine.mlx  # noqa: F401  (here, because most architectures need no look at its table)

    from mlx_lm.utils import MODEL_REMAPPING

    return architecture in MODEL_REMAPPING


def _weight_files(path: Path) -> list[Path]:
    """The files with weights. Raises Unusable if one is missing."""
    files = sorted(path.glob("model*.safetensors"))
    if (path / INDEX).exists():
        index = json.loads((path / INDEX).read_bytes())
        files = sorted({*files, *(path / name for name in set(index["weight_map"].values()))})
    if not files:
        raise Unusable("it has no weights (model*.safetensors)")
    if missing := [file.name for file in files if not file.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Unusable(f"{missing[0]}{more} missing: it was not downloaded to its end")
    return files


def _parameters(file: Path, bits: int | None) -> int:
    """Number of weights in a safetensors file. Raises Unusable if it is cut short."""
    try:
        header = safetensors_header.read(file)
    except safetensors_header.HeaderInvalid as error:
        raise Unusable(str(error)) from None
    size = file.stat().st_size
    end = header.begin + max((int(part["data_offsets"][1]) for part in header.arrays.values()), default=0)
    if end != size:
        raise Unusable(f"{file.name} has {size} bytes, and should have {end}")
    return header.count_weights(bits or safetensors_header.PACKED_BITS)


def _stated_type(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    """The quantisation method, or else the type of the weights."""
    if method := quantization.get("quant_method"):
        return str(method)
    stated = (part.get("torch_dtype") or part.get("dtype") for part in metadata.text_configs(config))
    return str(next(filter(None, stated), "unquantized"))


def _kv_values(config: Mapping[str, Any]) -> int:
    layers = metadata.first_stated([config], metadata.LAYER_KEYS)
    heads = metadata.attention_heads(config)
    kv_heads = metadata.first_stated([config], metadata.KV_HEAD_KEYS) or heads
    width = metadata.first_stated([config], ("head_dim",))
    width = width or metadata.first_stated([config], metadata.WIDTH_KEYS) // max(heads, 1)
    return 2 * layers * kv_heads * width


# -- GGUF files -------------------------------------------------------------------------------------------------------


def _gguf_facts(path: Path) -> Facts:
    header = gguf_header.read(path)
    architecture = str(header.fields.get("general.architecture", "unknown"))
    if int(header.fields.get("split.count", 0)) > 1:
        raise Unusable("it is one of several parts of a model, which can't be converted")
    if architecture not in CONVERTIBLE:
        raise Unusable(f"a GGUF file with the architecture {architecture!r} can't be converted")
    missing = header.end - path.stat().st_size
    if missing > 0:
        raise Unusable(f"it is cut short: {missing} bytes are missing")

    def number(name: str) -> int:
        value = header.fields.get(f"{architecture}.{name}", 0)
        return max(value) if isinstance(value, list) and value else int(value or 0)

    heads = number("attention.head_count")
    kv_heads = number("attention.head_count_kv") or heads
    key_width = number("attention.key_length") or number("embedding_length") // max(heads, 1)
    value_width = number("attention.value_length") or key_width
    return Facts(
        "gguf",
        architecture,
        header.main_type,
        sum(header.elements.values()),
        number("context_length") or None,
        number("block_count") * kv_heads * (key_width + value_width),
        gguf.converted_bytes(header.elements, architecture, current().weights),
    )
