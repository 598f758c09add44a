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
        *("gemma3", "gemma4", "idefics3", "llava", "mistral3", "pixtral", "smolvlm"),
        *("qwen2_5_vl", "qwen3_vl", "qwen3_5"),
    }
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # what a checkpoint's images are processed by
MODULES = "modules.json"  # of a checkpoint for sentence-transformers: its parts, one of which pools
POOLING = "1_Pooling/config.json"


def find_kind(config: Mapping[str, Any], *, pools: bool, has_processor: bool = False) -> Kind:
    """The kind of a model with this config.json. pools: its checkpoint has a pooling part. has_processor: of images."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if pools or config.get("model_type") in ENCODERS or any(name in HEADLESS for name in map(str, names)):
        return "embedding"
    return "vision" if has_processor and may_see(config) else "text"


def may_see(config: Mapping[str, Any]) -> bool:
    """Whether a model with this config.json sees, if its checkpoint has a processor of images."""
    return bool(config.get("vision_config")) and config.get("model_type") in SEEING


def has_processor(path: Path) -> bool:
    """Whether the checkpoint in a directory has a processor of images."""
    return any((path / name).is_file() for name in PROCESSORS)


def pools(path: Path) -> bool:
    """Whether the checkpoint in a directory has a pooling part."""
    return (path / POOLING).is_file() or names_pooling(path / MODULES)


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
