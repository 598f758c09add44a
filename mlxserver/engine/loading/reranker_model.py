"""Reranker: weights and tokenizer of one checkpoint that scores pairs of a query and a document.

A cross-encoder (Nogueira and Cho 2019) is an encoder with one score per pair, in mlx-vlm's classes. A judge is a text
model that is asked whether the document answers the query; its score is that of "yes" against "no" (Qwen3-Reranker).

Rule: load() runs on the thread that will use the model. It gives a whole model or raises LoadFailed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mlxserver.engine.mlx import mx, nn

import numpy as np

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache.caches import weight_bytes
from mlxserver.engine.loading import kinds, loader
from mlxserver.engine.loading.checkpoint_files import checked, read_object, refuse_code
from mlxserver.engine.loading.embedding_model import padded, read_encoder_tokenizer
from mlxserver.engine.loading.encoder_architecture import positions, replace_activations, with_rope_names
from mlxserver.engine.loading.estimate import embedding_context, judge_context
from mlxserver.engine.loading.metadata import attention_heads, context_length, model_arguments, vocab_size
from mlxserver.engine.loading.outcome import complete_or_nothing, naming
from mlxserver.engine.loading.sources import Progress, resolve, silent
from mlxserver.engine.loading.unsupported import naming_what_is_missing
from mlxserver.engine.platform import cpu_attention, device
from mlxserver.engine.platform.attention_memory import STEPWISE_TOKENS, AttentionMemory
from mlxserver.engine.platform.policy import ExecutionPolicy, current

JUDGEMENTS = ("no", "yes")


class Scorer(Protocol):
    """Computes the scores of pairs. Used on the engine thread."""

    def score(self, tokens: mx.array, mask: mx.array, types: mx.array) -> mx.array:
        """All [count, length] -> [count], from 0 to 1. mask: 0 for padding. types: 1 for the second text."""


@dataclass(frozen=True, slots=True)
class RerankerFacts:
    """What is known of a reranker. context_length: the longest pair in tokens. heads: of attention. is_judge: it is
    asked in words. has_types: it tells the two texts of a pair apart by a type of each token.
    """

    context_length: int
    heads: int
    vocab_size: int
    weight_bytes: int
    pad: int = 0
    is_judge: bool = False
    has_types: bool = False


class RerankerModel:
    """A loaded reranker. Used on the engine thread, but for `tokenizer` and `facts`."""

    def __init__(self, scorer: Scorer, tokenizer: Any, facts: RerankerFacts) -> None:
        self.tokenizer = tokenizer
        self.facts = facts
        self.context_length = facts.context_length
        self.heads = facts.heads
        self._scorer = scorer

    def encode(
        self,
        texts: Sequence[Sequence[int]],
        count: int,
        length: int,
        beside_peers: bool = False,
        second_texts: Sequence[int] = (),
    ) -> list[np.ndarray[Any, Any]]:
        """The scores of pairs of tokens, in a batch of the shape [count, length], each [1] in float32.

        beside_peers: other models stream meanwhile. second_texts: where the second text of each pair begins.
        """
        tokens, mask = padded(texts, count, length, self.facts.pad)
        types = np.zeros_like(mask)
        for row, begin in enumerate(second_texts):
            if begin:
                types[row, begin : len(texts[row])] = 1
        with cpu_attention.layer_by_layer(beside_peers or count * length >= STEPWISE_TOKENS):
            scores = self._scorer.score(mx.array(tokens), mx.array(mask), mx.array(types)).astype(mx.float32)
            mx.eval(scores)
        return list(np.array(scores)[: len(texts), None])


class _CrossEncoder:
    """Scorer of an encoder with a classification head of one label."""

    def __init__(self, model: nn.Module, *, has_types: bool) -> None:
        self._model = model
        self._has_types = has_types

    def score(self, tokens: mx.array, mask: mx.array, types: mx.array) -> mx.array:
        """The label's logit through a sigmoid."""
        extra = {"token_type_ids": types} if self._has_types else {}
        return mx.sigmoid(self._model(tokens, attention_mask=mask, **extra).logits[:, 0].astype(mx.float32))


class _Judge:
    """Scorer of a text model that answers "yes" or "no". judgements: tokens of JUDGEMENTS."""

    def __init__(self, model: Any, judgements: Sequence[int]) -> None:
        self._model = model
        no, yes = _rows(model.lm_head if "lm_head" in model else model.model.embed_tokens, judgements)
        self._direction = yes - no
        mx.eval(self._direction)

    def score(self, tokens: mx.array, mask: mx.array, types: mx.array) -> mx.array:
        """Probability of "yes" among the two, behind the last token. Padding follows it, so it sees none."""
        hidden = self._model.model(tokens)
        last = hidden[mx.arange(len(tokens)), mx.sum(mask, axis=1) - 1]
        return mx.sigmoid(last.astype(mx.float32) @ self._direction)


def load(spec: ModelSpec, *, progress: Progress = silent, policy: ExecutionPolicy | None = None) -> RerankerModel:
    """Fetch, read and prepare a reranker. Blocks for as long as that takes. Raises LoadFailed, LoadAborted."""
    policy = replace((policy or current()).with_weights(spec.weights), fuse_projections=False)
    path, config = complete_or_nothing(spec, lambda: _files(spec, progress, policy))
    if kinds.is_cross_encoder(config):
        return complete_or_nothing(spec, lambda: _load_cross_encoder(spec, path, config, progress, policy))
    loaded = loader.load(spec, progress=progress, policy=policy)
    return complete_or_nothing(spec, lambda: _judge(spec, loaded, policy))


def _files(spec: ModelSpec, report: Progress, policy: ExecutionPolicy) -> tuple[Path, Mapping[str, Any]]:
    """The directory of a reranker, and its config.json. Raises ValueError if it is none."""
    path = resolve(spec.source, progress=report, weights=policy.weights)
    with naming(f"the model in {path} can't be read"):
        config = read_object(path / "config.json") or {}
        refuse_code(config)
    if not kinds.is_cross_encoder(config) and config.get("model_type") not in kinds.JUDGES:
        raise ValueError(
            f"{config.get('model_type')!r} is no reranker: expected a sequence classifier with one label, or a text "
            f"model of the type {' or '.join(sorted(kinds.JUDGES))}"
        )
    return path, config


def _load_cross_encoder(
    spec: ModelSpec, path: Path, config: Mapping[str, Any], report: Progress, policy: ExecutionPolicy
) -> RerankerModel:
    if policy.wire_memory:
        device.set_wired_limit_once()
    report("reading", 0, 0)
    with naming(f"the model in {path} can't be read"), naming_what_is_missing():
        from mlx_vlm.reranker_loader import load_sequence_classification_model

        model = load_sequence_classification_model(path, lazy=True, config=with_rope_names(config))
        replace_activations(model, config)
    with naming(f"the weights in {path} can't be used"):
        model = loader.prepare(model, report, policy)
    with naming(f"the tokenizer in {path} can't be read"), checked(path) as files:
        tokenizer = _plain(read_encoder_tokenizer(files))
    heads = attention_heads(config)
    has_types = getattr(model.config, "type_vocab_size", 1) > 1 and "token_type_ids" in tokenizer.model_input_names
    facts = RerankerFacts(
        embedding_context(spec, positions(config), AttentionMemory(heads, policy)),
        heads,
        vocab_size(config) or len(tokenizer),
        weight_bytes(model),
        int(config.get("pad_token_id") or 0),
        has_types=has_types,
    )
    return RerankerModel(_CrossEncoder(model, has_types=has_types), tokenizer, facts)


def _judge(spec: ModelSpec, loaded: loader.LoadedModel, policy: ExecutionPolicy) -> RerankerModel:
    tokenizer = _plain(loaded.tokenizer._tokenizer)
    with naming(f"the tokenizer in {loaded.path} can't be used"):
        judgements = [_token(tokenizer, word) for word in JUDGEMENTS]
    arguments = model_arguments(loaded.model)
    heads = attention_heads(loaded.config, *arguments)
    own = context_length(spec.key, loaded.config, *arguments)
    facts = RerankerFacts(
        judge_context(spec, own, AttentionMemory(heads, policy)),
        heads,
        vocab_size(loaded.config) or len(tokenizer),
        loaded.weight_bytes,
        is_judge=True,
    )
    return RerankerModel(_Judge(loaded.model, judgements), tokenizer, facts)


def _plain(tokenizer: Any) -> Any:
    """The tokenizer, without the cutting and padding that its file may state. Raises ValueError."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ValueError("it is not one of the library tokenizers")
    core.no_truncation()
    core.no_padding()
    return tokenizer


def _token(tokenizer: Any, word: str) -> int:
    """The token of a word. Raises ValueError if it has several."""
    tokens = tokenizer.encode(word, add_special_tokens=False)
    if len(tokens) != 1:
        raise ValueError(f"it has no token for {word!r}")
    return int(tokens[0])


def _rows(layer: Any, tokens: Sequence[int]) -> mx.array:
    """Rows of an output layer, [tokens, hidden] in float32."""
    rows = mx.array(list(tokens))
    if "scales" not in layer:
        plain: mx.array = layer["weight"][rows].astype(mx.float32)
        return plain
    biases = layer.biases[rows] if "biases" in layer else None
    weight = mx.dequantize(
        layer.weight[rows],
        layer.scales[rows],
        biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=getattr(layer, "mode", "affine"),
    )
    return weight.astype(mx.float32)
