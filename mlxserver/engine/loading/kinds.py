"""Kind of a model, found from the files of its checkpoint. Importing this module does not import MLX."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxserver.config.settings import Kind

# Encoders, which have no token to go on from: text that such a checkpoint made would be noise.
ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "mpnet", "distilbert"})
# Architectures of text models that embedding checkpoints have, too, without the head that makes tokens.
HEADLESS = frozenset({"Qwen3Model", "Gemma3TextModel", "Ministral3Model", "Lfm2Model", "LlamaBidirectionalModel"})
# Types of models that see, whose vision part mlx-vlm runs as tried here, and whose text part mlx-lm does.
SEEING = frozenset(
    {
        *("aya_vision", "gemma3", "gemma4", "idefics3", "internvl", "internvl_chat", "kimi_vl", "lfm2-vl", "lfm2_vl"),
        *("llama4", "llava", "llava_onevision", "mistral3", "pixtral", "smolvlm"),
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    }
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # what a checkpoint's images are processed by
MODULES = "modules.json"  # of a checkpoint for sentence-transformers: its parts, one of which pools
POOLING = "1_Pooling/config.json"
# Of those, and of text models, the ones whose embedding models mlx-vlm has classes for.
EMBEDDERS = frozenset(
    {"bert", "xlm-roberta", "modernbert", "qwen3", "gemma3_text", "ministral3", "lfm2", "llama_bidirec"}
)
# Text models whose rerankers answer with a token, yes or no; their config.json is that of any text model.
JUDGES = frozenset({"qwen3"})
RERANKERS = JUDGES | {"bert", "xlm-roberta", "modernbert"}
_CLASSIFIER = "ForSequenceClassification"


def find_kind(config: Mapping[str, Any], *, pools: bool, ranks: bool = False, has_processor: bool = False) -> Kind:
    """The kind of a model with this config.json. pools: its checkpoint has a pooling part; ranks: its files or its name
    state that it is a reranker; has_processor: it has one of images.
    """
    architectures = config.get("architectures")
    names = list(map(str, architectures)) if isinstance(architectures, list) else []
    model_type = config.get("model_type")
    if is_cross_encoder(config) or (ranks and not pools and model_type in JUDGES):
        return "rerank"
    if pools or model_type in ENCODERS or any(name in HEADLESS for name in names):
        return "embedding"
    return "vision" if has_processor and may_see(config) else "text"


def may_see(config: Mapping[str, Any]) -> bool:
    """Whether a model with this config.json sees, if its checkpoint has a processor of images."""
    return bool(config.get("vision_config")) and config.get("model_type") in SEEING


def has_processor(path: Path) -> bool:
    """Whether the checkpoint in a directory has a processor of images."""
    return any((path / name).is_file() for name in PROCESSORS)


def kind_of(path: Path, config: Mapping[str, Any]) -> Kind:
    """The kind of the checkpoint in a directory. config: its config.json."""
    return find_kind(config, pools=pools(path), ranks=ranks(path), has_processor=has_processor(path))


def is_cross_encoder(config: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of an encoder with one score for a pair of texts, instead of several classes."""
    architectures, labels = config.get("architectures"), config.get("id2label")
    if not isinstance(architectures, list) or not any(str(name).endswith(_CLASSIFIER) for name in architectures):
        return False
    count = config.get("num_labels") or (len(labels) if isinstance(labels, dict) else 1)
    return config.get("model_type") in ENCODERS and count == 1


def pools(path: Path) -> bool:
    """Whether the checkpoint in a directory has a pooling part."""
    return (path / POOLING).is_file() or names_pooling(path / MODULES)


def ranks(path: Path) -> bool:
    """Whether the checkpoint in a directory, which may be a snapshot of a repository, is stated to be a reranker."""
    name = path.parent.parent.name if path.parent.name == "snapshots" else path.name
    return is_named_reranker(name) or names_scoring(path / MODULES)


def is_named_reranker(name: str) -> bool:
    """Whether the name of a repository or directory is that of a reranker."""
    return "rerank" in name.lower()


def names_scoring(file: Path) -> bool:
    """Whether a modules.json names a part that makes a score of the next token."""
    return any(part.endswith("LogitScore") for part in parts(file))


def names_pooling(file: Path) -> bool:
    """Whether a modules.json names a pooling part."""
    return any(part.endswith("Pooling") for part in parts(file))


def parts(file: Path) -> list[str]:
    """Types of the parts that a modules.json lists; none where that can't be read."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [str(part.get("type")) for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
