"""Checkpoint metadata: facts of a model from its files, before its weights are read."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from mlxserver.config.settings import Kind
from mlxserver.engine.loading import safetensors_header

log = logging.getLogger("engine")

FALLBACK_CONTEXT = 4096  # tokens
CONTEXT_KEYS = (
    *("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "n_ctx", "seq_length"),
    *("model_max_length", "max_context_length", "block_size"),
)
HEAD_KEYS = ("num_attention_heads", "n_heads", "n_head", "num_heads", "num_query_heads")
KV_HEAD_KEYS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")
LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
# Weights that mlx-lm leaves out: towers for images and sound with their projectors, and heads that predict more tokens.
_LEFT_OUT = re.compile(
    r"(?:^|\.)(?:vision_tower|vision_model|vision_embedder|visual|multi_modal_projector|mm_projector|"
    r"audio_tower|embed_vision|embed_audio|mtp)\."
)
_IN_LAYER = re.compile(r"model\.(?P<is_own>mtp_)?layers\.(?P<number>\d+)\.(?P<name>.+)")
_HEADS_KEY = "num_nextn_predict_layers"


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """Metadata of a checkpoint. config: its config.json. stored_bytes: size of its weights in their stored format,
    without those of other towers than the text model where the files are at hand, which tower_bytes has then. kind: as
    the files tell it. has_head: it has a head that predicts more tokens (mtp.py), or may have one.
    """

    config: Mapping[str, Any]
    stored_bytes: int
    kind: Kind = "text"
    tower_bytes: int = 0
    has_head: bool = False


def read_config(file: Path) -> dict[str, Any]:
    """The object in a config.json, its tagged floats (`{"__float__": "Infinity"}`) decoded as mlx-lm does.

    Raises OSError; ValueError if there is no object in it.
    """
    config = json.loads(file.read_text(encoding="utf-8"), object_hook=_decode_float)
    if not isinstance(config, dict):
        raise ValueError(f"{file} has no object in it")
    return config


def text_bytes(file: Path) -> int:
    """Size of the text model's weights in a safetensors file; that of the file if its header can't be read.

    Raises OSError.
    """
    size = file.stat().st_size
    try:
        arrays = safetensors_header.read(file).arrays
        left_out = [part for name, part in arrays.items() if _LEFT_OUT.search(name)]
        return size - sum(int(part["data_offsets"][1]) - int(part["data_offsets"][0]) for part in left_out)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return size


def states_head(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that there is a head that predicts more tokens, which a conversion may leave out."""
    return isinstance(count := config.get(_HEADS_KEY), int) and count > 0


def place_in_head(name: str, num_layers: object) -> tuple[int, str] | None:
    """Which head a checkpoint's weight belongs to, and its name there; None of any other weight.

    Heads are layers behind the model's own, or have numbers of their own. num_layers: of the model.
    """
    match = _IN_LAYER.fullmatch(name)
    if match is None or not isinstance(num_layers, int):
        return None
    number = int(match["number"]) - (0 if match["is_own"] else num_layers)
    return (number, match["name"]) if number >= 0 else None


def has_head(config: Mapping[str, Any], files: Iterable[Path]) -> bool:
    """Whether a checkpoint has such a head; one whose files can't be read may have it. No network."""
    if not states_head(config):
        return False
    try:
        names = [name for file in files for name in safetensors_header.read(file).arrays]
    except (OSError, ValueError):
        return True
    return any(place_in_head(name, config.get("num_hidden_layers")) for name in names)


def _decode_float(value: dict[str, Any]) -> Any:
    """The number of a tagged float, which transformers writes where JSON has none; any other object as it is."""
    tagged = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
    return tagged.get(str(value.get("__float__")), value) if len(value) == 1 else value


def text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of a configuration that may describe its text model: itself and its nested ones.

    In a config.json they are objects; in the arguments that mlx-lm makes of it, some are dataclasses.
    """
    yield config
    for name in TEXT_CONFIGS:
        part = config.get(name)
        if isinstance(part, Mapping):
            yield part
        elif is_dataclass(part):
            yield vars(part)


def nested_text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested part of a config.json that describes its text model; empty without one."""
    return next((dict(part) for name in TEXT_CONFIGS if isinstance(part := config.get(name), Mapping) and part), {})


def model_arguments(model: Any) -> Iterator[Mapping[str, Any]]:
    """The arguments that mlx-lm's model and its parts were made with: config.json, and defaults where it has gaps."""
    seen: set[int] = set()
    for _, module in model.named_modules():  # the model itself is the first
        for arguments in (getattr(module, "args", None), getattr(module, "config", None)):
            if is_dataclass(arguments) and id(arguments) not in seen:
                seen.add(id(arguments))
                yield vars(arguments)


def context_length(key: str, *stated: Mapping[str, Any]) -> int:
    """The context in tokens that a config.json states, or else its model's arguments (model_arguments()).

    FALLBACK_CONTEXT if none does, with a warning in the log.
    """
    if context := first_stated(stated, CONTEXT_KEYS):
        return context
    log.warning("%s: its config.json states no context length; taking %d tokens", key, FALLBACK_CONTEXT)
    return FALLBACK_CONTEXT


def stated_context(*stated: Mapping[str, Any]) -> int:
    """The context in tokens that a config.json states; 0 if it does not."""
    return first_stated(stated, CONTEXT_KEYS)


def attention_heads(*stated: Mapping[str, Any]) -> int:
    """Number of query heads in a config.json, or in its model's arguments; 0 if none states it."""
    return first_stated(stated, HEAD_KEYS)


def first_stated(stated: Iterable[Mapping[str, Any]], names: tuple[str, ...]) -> int:
    """The first value of these names above 0; of a list with one value per layer, the largest."""
    for config in stated:
        for part in text_configs(config):
            for name in names:
                value = part.get(name)
                values = value if isinstance(value, (list, tuple)) else [value]
                if largest := max((n for n in values if type(n) is int), default=0):
                    return largest
    return 0


def vocab_size(config: Mapping[str, Any]) -> int:
    """Size of the vocabulary that a config.json states, which may be padded; 0 if not stated."""
    return first_stated([config], ("vocab_size",))
