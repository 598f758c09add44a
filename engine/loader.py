"""Weights, tokenizer and facts of one model, read into memory.

Rule 1: load() runs on the thread that will use the model.
Rule 2: it gives a whole model or raises LoadFailed with one line that says what to do about; nothing stays in memory.
Rule 3: code that comes with a model is never run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_adapters, load_model, load_tokenizer

from engine import blas, device
from engine.config import ModelSpec
from engine.errors import LoadFailed, SourceInvalid
from engine.sources import Progress, resolve, silent

log = logging.getLogger("engine")

FALLBACK_CONTEXT = 4096  # tokens
CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "n_ctx", "seq_length")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    config: config.json as mlx-lm reads it. path: the local MLX directory. context_length: tokens.
    generation_defaults: those of GENERATION_KEYS that the model's makers recommend. weight_bytes: in memory.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: Mapping[str, Any]
    path: Path
    context_length: int
    generation_defaults: Mapping[str, float]
    weight_bytes: int


def load(spec: ModelSpec, *, progress: Progress | None = None) -> LoadedModel:
    """Fetch, read and prepare a model. Blocks for as long as that takes. Raises LoadFailed.

    progress hears of "downloading", "converting" and "reading" (bytes of weights).
    """
    blas.warn_if_missing()
    device.set_wired_limit_once()
    try:
        return _load(spec, progress)
    except Exception as error:  # a broken model can raise anything from any of the libraries
        log.debug("Loading %s failed", spec.key, exc_info=True)
        failure = LoadFailed(spec.key, _one_line(error))
    # Out here, because an error raised above would carry the failed load's frames, and with them its weights.
    gc.collect()
    mx.clear_cache()
    raise failure


def _load(spec: ModelSpec, progress: Progress | None) -> LoadedModel:
    path = resolve(spec.source, progress=progress)
    report = progress or silent
    file_bytes = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
    report("reading", 0, file_bytes)
    with _naming(f"the model in {path} can't be read"):
        model, config = load_model(path, lazy=True, trust_remote_code=False)
    if spec.adapter is not None:
        with _naming(f"the adapter {spec.adapter!r} can't be used with this model"):
            model = load_adapters(model, str(Path(spec.adapter).expanduser()))
    with _naming(f"the weights in {path} can't be used"):
        model = _prepared(model)
    report("reading", file_bytes, file_bytes)
    with _naming(f"the tokenizer in {path} can't be read"):
        options = {"trust_remote_code": False}
        tokenizer = load_tokenizer(path, options, eos_token_ids=config.get("eos_token_id"))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=config,
        path=path,
        context_length=spec.context_length or context_length(spec.key, config),
        generation_defaults=generation_defaults(path),
        weight_bytes=sum(array.nbytes for _, array in tree_flatten(model.parameters())),
    )


def _prepared(model: nn.Module) -> nn.Module:
    """The model as this device runs it fastest, evaluated."""
    if device.is_cpu():  # float16 and quantized layers are some thirty times slower there
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
    fused = [(name, layer.fuse()) for name, layer in model.named_modules() if _is_fusable(layer)]
    if fused:
        model.update_modules(tree_unflatten(fused))
    model.eval()
    mx.eval(model.parameters())
    return model


def _is_fusable(layer: nn.Module) -> bool:
    """Whether the adapter can go into the layer's weight. A quantized weight would lose it to rounding."""
    if not hasattr(layer, "fuse"):
        return False
    wrapped = getattr(layer, "linear", None) or getattr(layer, "embedding", None)
    return wrapped is not None and not hasattr(wrapped, "bits")


def context_length(key: str, config: Mapping[str, Any]) -> int:
    """The context in tokens that a config.json states; FALLBACK_CONTEXT, and a line in the log, if none."""
    nested = [config[name] for name in TEXT_CONFIGS if isinstance(config.get(name), dict)]
    for part in (config, *nested):
        for name in CONTEXT_KEYS:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    log.warning("%s: its config.json states no context length; taking %d tokens", key, FALLBACK_CONTEXT)
    return FALLBACK_CONTEXT


def generation_defaults(path: Path) -> dict[str, float]:
    """Sampling values that the model's generation_config.json recommends; empty if there is none to read."""
    try:
        stated = json.loads((path / "generation_config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stated, dict):
        return {}
    return {key: stated[key] for key in GENERATION_KEYS if type(stated.get(key)) in (int, float)}


class _Unusable(Exception):
    """A part of the model that failed, in words."""


@contextlib.contextmanager
def _naming(problem: str) -> Iterator[None]:
    """Put a name to whatever goes wrong inside."""
    try:
        yield
    except Exception as error:
        raise _Unusable(f"{problem}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, (SourceInvalid, _Unusable, ValueError, RuntimeError, OSError)) or not text:
        text = f"{type(error).__name__} {text}".rstrip()
    return text if len(text) <= 400 else text[:400] + " ..."
