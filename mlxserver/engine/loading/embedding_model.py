"""Embedding model: weights, tokenizer and pooling of one checkpoint, read into memory by mlx-vlm's classes.

Rule 1: load() runs on the thread that will use the model. It gives a whole model or raises LoadFailed.
Rule 2: pooling and normalization are what the checkpoint states; without a statement, what its architecture is made
        for, normalized.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from mlxserver.engine.mlx import mx, nn

import numpy as np
from transformers import AutoTokenizer, PreTrainedConfig

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache.caches import weight_bytes
from mlxserver.engine.loading import kinds
from mlxserver.engine.loading.checkpoint_files import checked, read_object, refuse_code
from mlxserver.engine.loading.encoder_architecture import positions, replace_activations, with_rope_names
from mlxserver.engine.loading.estimate import embedding_context
from mlxserver.engine.loading.loader import prepare
from mlxserver.engine.loading.metadata import attention_heads, vocab_size
from mlxserver.engine.loading.outcome import complete_or_nothing, naming
from mlxserver.engine.loading.sources import Progress, resolve, silent
from mlxserver.engine.loading.unsupported import naming_what_is_missing
from mlxserver.engine.platform import cpu_attention, device
from mlxserver.engine.platform.attention_memory import STEPWISE_TOKENS, AttentionMemory
from mlxserver.engine.platform.policy import ExecutionPolicy, current

log = logging.getLogger("engine")

# Architectures whose embedding checkpoints are trained so that the leading values of a vector are one by themselves
# (Kusupati et al. 2022, Matryoshka Representation Learning), without a statement in their files.
_NESTED = frozenset({"qwen3", "gemma3_text"})


@dataclass(frozen=True, slots=True)
class EmbeddingFacts:
    """What a checkpoint states of its vectors. dimensions: of a whole one. nested: lengths to which they may be cut,
    None for any, empty for none. prompts: text before each text, by name; default_prompt: without a name.
    """

    dimensions: int
    nested: tuple[int, ...] | None = ()
    prompts: Mapping[str, str] | None = None
    default_prompt: str | None = None
    is_normalized: bool = True


class EmbeddingModel:
    """A loaded embedding model. Used on the engine thread, but for `tokenizer` and `facts`.

    context_length: the longest text in tokens. attention: memory of its scores.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, config: Mapping[str, Any], path: Path, context: int, heads: int
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size(config) or len(tokenizer)
        self.context_length = context
        self.heads = heads
        self.weight_bytes = weight_bytes(model)
        self._model = model
        self._pad = int(config.get("pad_token_id") or 0)
        self.facts = _stated_facts(path, config)
        self.facts = replace(self.facts, dimensions=len(self.encode([(self._pad,)], 1, 1)[0]))

    def encode(
        self,
        texts: Sequence[Sequence[int]],
        count: int,
        length: int,
        beside_peers: bool = False,
        second_texts: Sequence[int] = (),
    ) -> list[np.ndarray[Any, Any]]:
        """The vectors of texts of tokens, in a batch of the shape [count, length], each [dimensions] in float32.

        beside_peers: other models stream meanwhile. second_texts: of no meaning here.
        """
        tokens, mask = padded(texts, count, length, self._pad)
        with cpu_attention.layer_by_layer(beside_peers or count * length >= STEPWISE_TOKENS):
            vectors = self._pooled(mx.array(tokens), mx.array(mask)).astype(mx.float32)
            mx.eval(vectors)
        return list(np.array(vectors)[: len(texts)])

    def _pooled(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """[count, length] -> [count, dimensions]."""
        output = self._model(tokens, attention_mask=mask)
        if self.facts.is_normalized or self._model.pooling_config is None:
            return cast(mx.array, output.text_embeds)
        from mlx_vlm.models.pooling import pool_by_config

        pooled = pool_by_config(output.last_hidden_state, mask, self._model.pooling_config)
        for dense in getattr(self._model, "dense", ()):
            pooled = dense(pooled)
        return cast(mx.array, pooled)


def padded(
    texts: Sequence[Sequence[int]], count: int, length: int, pad: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Texts of tokens with padding behind them, and 1 where there is none, both [count, length]."""
    tokens = np.full((count, length), pad, dtype=np.int32)
    mask = np.zeros((count, length), dtype=np.int32)
    mask[len(texts) :, 0] = 1  # a text without a token would have no number as its mean
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return tokens, mask


def load(spec: ModelSpec, *, progress: Progress = silent, policy: ExecutionPolicy | None = None) -> EmbeddingModel:
    """Fetch, read and prepare an embedding model. Blocks for as long as that takes. Raises LoadFailed, LoadAborted."""
    policy = (policy or current()).with_weights(spec.weights)
    return complete_or_nothing(spec, lambda: _load(spec, progress, policy))


def _load(spec: ModelSpec, report: Progress, policy: ExecutionPolicy) -> EmbeddingModel:
    if policy.wire_memory:
        device.set_wired_limit_once()
    path = resolve(spec.source, progress=report, weights=policy.weights)
    report("reading", 0, 0)
    with naming(f"the model in {path} can't be read"), naming_what_is_missing():
        from mlx_vlm.embedding_loader import load_embedding_model
        from mlx_vlm.models.pooling import read_pooling_config

        config = read_object(path / "config.json") or {}
        refuse_code(config)
        model = load_embedding_model(path, lazy=True, config=with_rope_names(config))
        model.pooling_config = read_pooling_config(path)
        replace_activations(model, config)
    with naming(f"the weights in {path} can't be used"):
        model = prepare(model, report, replace(policy, fuse_projections=False))
    with naming(f"the tokenizer in {path} can't be read"), checked(path) as files:
        tokenizer = read_encoder_tokenizer(files)
    heads = attention_heads(config)
    context = embedding_context(spec, positions(config), AttentionMemory(heads, policy))
    with naming("the model can't be run"):
        return EmbeddingModel(model, tokenizer, config, path, context, heads)


def read_encoder_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory, without a length of its own: the model's context is checked here."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as refusal:  # transformers reads config.json first, and may not know the architecture
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, config=PreTrainedConfig())
        except Exception:
            raise refusal from None
    tokenizer.model_max_length = 1 << 30
    return tokenizer


def _stated_facts(path: Path, config: Mapping[str, Any]) -> EmbeddingFacts:
    """Facts of the vectors from a checkpoint's files; a wrong statement counts as none."""
    settings = _object(path / "config_sentence_transformers.json")
    prompts = settings.get("prompts")
    prompts = {str(k): v for k, v in prompts.items() if isinstance(v, str)} if isinstance(prompts, dict) else {}
    default = settings.get("default_prompt_name")
    nested: tuple[int, ...] | None = ()
    lengths = config.get("matryoshka_dimensions")
    if isinstance(lengths, list) and all(type(length) is int for length in lengths):
        nested = tuple(lengths)
    elif config.get("is_matryoshka") or config.get("model_type") in _NESTED:
        nested = None
    return EmbeddingFacts(0, nested, prompts, default if default in prompts else None, _is_normalized(path))


def _is_normalized(path: Path) -> bool:
    """Whether the vectors have the length 1: where the checkpoint lists its parts, one of them must do that."""
    parts = kinds.parts(path / kinds.MODULES)
    return not parts or any(part.endswith("Normalize") for part in parts)


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file) or {}
    except ValueError as error:
        log.warning("%s. It is left out.", error)
        return {}
