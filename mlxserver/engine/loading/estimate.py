"""Memory estimate of a model before it is loaded, and the memory budget of all models. All sizes are bytes.

Rule 1: an estimate reads configurations and sizes of files, never weights; nothing is computed.
Rule 2: an estimate is an upper bound: KV cache beyond it is claimed from the pool (engine/kv_pool.py), and prefill
        chunks are no longer than what was counted (platform/attention_memory.py).
Rule 3: importing this module does not import MLX: the manager needs only its types.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlxserver.config.settings import Kind, ModelSpec
from mlxserver.engine.errors import LoadFailed, one_line
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.metadata import CheckpointMetadata, attention_heads, context_length
from mlxserver.engine.loading.sources import checkpoint_metadata
from mlxserver.engine.loading.unsupported import Unsupported, naming_what_is_missing
from mlxserver.engine.loading.weight_bytes import adapter_bytes, has_fewer_bits, value_bytes, weight_bytes
from mlxserver.engine.platform.attention_memory import LARGEST_CHUNK, STATE_REACH, AttentionMemory
from mlxserver.engine.platform.policy import ExecutionPolicy, WeightPolicy, current

if TYPE_CHECKING:
    from mlxserver.engine.kv_cache.quantized import KVFormat
    from mlxserver.engine.loading.architecture import Architecture
    from mlxserver.engine.loading.encoder_architecture import EncoderArchitecture
    from mlxserver.engine.loading.vision_architecture import VisionArchitecture

# Tokens of a shared model's KV cache by default, which all ranks reserve: some conversations of ordinary length.
DEFAULT_CACHE_TOKENS = 32_768
JUDGE_CONTEXT = 8192  # of Qwen3-Reranker (huggingface.co/Qwen/Qwen3-Reranker-0.6B), whose positions go further
# Memory of a model beside its arrays, whatever its size: its tokenizer, and what MLX keeps for the next arrays.
_RUNTIME_BYTES = 64 << 20
_ENCODER_RUNTIME_BYTES = 32 << 20  # the same of an encoder, which compiles nothing and samples nothing
_SAMPLING_ARRAYS = 4  # of [sequences, vocab] in float32 at once: logits, probabilities, their sums, a mask


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a model in tokens.

    context: of one request. reserved: KV cache that is reserved, for `sequences`. cache_tokens: most in the KV cache of
    all requests together, None for no cap.
    """

    context: int
    reserved: int
    sequences: int
    cache_tokens: int | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a model: its weights in their loaded format, the reserved KV cache, the activations of a step.

    widened: of the weights in 16 bits, where products are faster with them than as they are stored; 0 elsewhere.
    """

    weights: int
    cache: int
    activations: int
    widened: int = 0

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.weights + self.cache + self.activations

    def with_draft(self, draft: Estimate) -> Estimate:
        """The memory with that of a draft model beside it. The two never compute at the same time."""
        return Estimate(
            self.weights + draft.weights,
            self.cache + draft.cache,
            max(self.activations, draft.activations),
            self.widened and self.widened + draft.weights,
        )


def budget(limit: int, policy: ExecutionPolicy | None = None) -> int:
    """The memory that all models may take: the limit, or the policy's share of the device's memory if it is 0."""
    from mlxserver.engine.platform import device

    return limit or int(device.describe().memory_bytes * (policy or current()).memory_share)


def limits(spec: ModelSpec, own_context: int) -> Limits:
    """The limits of a model with a context of `own_context` tokens; the configuration may state a longer one.

    A model that ranks share has all its KV cache reserved: they decide alike because nothing changes it.
    """
    context = spec.context_length or own_context
    if spec.shard:
        most = max(DEFAULT_CACHE_TOKENS, spec.context_length or 0)
        cache_tokens = spec.cache_tokens or min(most, context * spec.max_running)
        return Limits(min(context, cache_tokens), cache_tokens, spec.max_running, cache_tokens)
    context = min(context, spec.cache_tokens or context)
    return Limits(context, min(context, spec.min_context), 1, spec.cache_tokens)


def estimate(spec: ModelSpec, policy: ExecutionPolicy | None = None) -> Estimate:
    """The memory that the model will take, with its draft model's. Blocks: it reads some files, or asks the hub.

    To be called on a thread that has an MLX stream (worker/thread_pool.py); otherwise one is made, and stays.

    Raises:
        LoadFailed
    """
    own, context = _estimate(spec, policy)
    if spec.drafter is None or not counts_draft(spec, policy or current()):
        return own
    drafter = replace(
        spec.drafter,
        context_length=context,
        min_context=spec.min_context,
        cache_tokens=spec.cache_tokens,
        max_running=spec.max_running,
        mtp=False,
    )
    return own.with_draft(_estimate(drafter, policy)[0])


def counts_draft(spec: ModelSpec, policy: ExecutionPolicy) -> bool:
    """Whether a draft model is a part of the estimate, by the settings and the device. No other is loaded, whatever was
    measured of the model since.
    """
    with suppress(ValueError):  # of settings that contradict each other, which the load reports
        policy = policy.with_fields(spec.policy)
    return policy.may_draft_by_model(spec.speculation)


def _estimate(spec: ModelSpec, policy: ExecutionPolicy | None) -> tuple[Estimate, int]:
    """The memory of one model, and its context in tokens."""
    from mlxserver.engine.loading.architecture import inspect_architecture
    from mlxserver.engine.loading.kv_format import kv_format
    from mlxserver.engine.loading.mtp import is_wanted

    policy = (policy or current()).with_weights(spec.weights, is_shared=spec.shard is not None)
    try:
        metadata = checkpoint_metadata(spec.source, policy.weights)
        with naming_what_is_missing():
            if encoder := _encoder(spec.kind or metadata.kind, metadata):
                return _encoder_estimate(spec, metadata, encoder, policy), 0
            kv = kv_format(spec)
            vision = _vision(spec, metadata)
            with_head = metadata.has_head and is_wanted(spec, policy)
            architecture = inspect_architecture(metadata.config, kv, with_head=with_head)
    except (SourceInvalid, Unsupported) as error:
        raise LoadFailed(spec.key, str(error)) from None
    except Exception as error:  # a broken config.json can make an architecture raise anything
        text = one_line(error)
        raise LoadFailed(spec.key, f"its config.json can't be used: {type(error).__name__}: {text}") from None
    return _decoder_estimate(spec, metadata, architecture, vision, kv, policy)


def _decoder_estimate(
    spec: ModelSpec,
    metadata: CheckpointMetadata,
    architecture: Architecture,
    vision: VisionArchitecture | None,
    kv: KVFormat | None,
    policy: ExecutionPolicy,
) -> tuple[Estimate, int]:
    """The memory that a model that generates will take, and its context in tokens. kv: None if it is not quantized."""
    value = value_bytes(metadata.config, policy)
    heads = attention_heads(metadata.config, *architecture.arguments)
    dequantized = architecture.widest_layer * value if kv else 0
    attention = AttentionMemory(heads, policy, 0 if architecture.layers else STATE_REACH, dequantized)
    own = limits(spec, context_length(spec.key, metadata.config, *architecture.arguments))
    activations = _chunk_bytes(architecture.width * value, attention, own.context)
    if vision:
        activations = max(activations, vision.activation_bytes(value, policy)) + vision.kept_bytes
    if spec.shard:  # or else a long prompt claims it
        activations += attention.bytes_beyond(own.context)
    weights, widened = _decoder_weights(spec, metadata, architecture, vision, policy)
    found = Estimate(
        weights=weights,
        cache=architecture.cache_bytes(own.reserved, own.sequences, value, kv),
        activations=activations + spec.max_running * architecture.vocab * 4 * _SAMPLING_ARRAYS + _RUNTIME_BYTES,
        widened=widened,
    )
    return found, own.context


def _decoder_weights(
    spec: ModelSpec,
    metadata: CheckpointMetadata,
    architecture: Architecture,
    vision: VisionArchitecture | None,
    policy: ExecutionPolicy,
) -> tuple[int, int]:
    """The weights of a model that generates, and the same in 16 bits, or 0: see Estimate."""
    values, in_layers, stored = architecture.weights, architecture.in_layers, metadata.stored_bytes
    if vision:
        values, in_layers = values + vision.weights, in_layers + vision.in_layers
        stored += metadata.tower_bytes
    if spec.adapter:
        in_layers = 0  # those that it is added to become float32
    adapter = 0 if policy.weights is WeightPolicy.FLOAT32 else adapter_bytes(spec)  # which is fused there
    weights = weight_bytes(values, in_layers, stored, policy.weights, metadata.config)
    may_widen = spec.weights == "auto" and not spec.shard and policy.widens(architecture.has_experts)
    widened = values * 2 + adapter if may_widen and has_fewer_bits(values, stored) else 0
    return weights + adapter, widened


def _vision(spec: ModelSpec, metadata: CheckpointMetadata) -> VisionArchitecture | None:
    """The vision part that a model will be loaded with; None without one."""
    if (spec.kind or metadata.kind) != "vision" or spec.shard:
        return None
    from mlxserver.engine.loading.vision_architecture import inspect_vision_architecture

    try:
        return inspect_vision_architecture(metadata.config)
    except Exception:
        if spec.kind:
            raise
        return None  # it will be a text model


def _encoder(kind: Kind, metadata: CheckpointMetadata) -> EncoderArchitecture | None:
    """The architecture of an embedding model or a reranker; None of a model of another kind."""
    from mlxserver.engine.loading import encoder_architecture

    if kind == "embedding":
        return encoder_architecture.inspect_embedding_architecture(metadata.config)
    return encoder_architecture.inspect_reranker_architecture(metadata.config) if kind == "rerank" else None


def _encoder_estimate(
    spec: ModelSpec, metadata: CheckpointMetadata, architecture: EncoderArchitecture, policy: ExecutionPolicy
) -> Estimate:
    """The memory that an encoder will take: no KV cache, and the activations of its largest batch."""
    value = value_bytes(metadata.config, policy)
    attention = AttentionMemory(architecture.heads, policy)
    longest = judge_context if architecture.is_judge else embedding_context
    context = longest(spec, architecture.context, attention)
    most = most_batch_tokens(context, policy)
    return Estimate(
        weights=weight_bytes(
            architecture.weights, architecture.in_layers, metadata.stored_bytes, policy.weights, metadata.config
        ),
        cache=0,
        activations=most * architecture.activation_bytes(value, policy)
        + attention.batch_bytes(most, context)
        + _ENCODER_RUNTIME_BYTES,
    )


def embedding_context(spec: ModelSpec, own: int, attention: AttentionMemory) -> int:
    """The longest text of an embedding model in tokens: what the settings state, or else the model's own, as far as
    the scores of its attention are of bearable size. A position beyond its own does not exist.
    """
    return min(own, spec.context_length or attention.longest_text())


def judge_context(spec: ModelSpec, own: int, attention: AttentionMemory) -> int:
    """The longest pair of a judge in tokens: likewise, and by default not beyond what its makers evaluate it with."""
    return min(embedding_context(spec, own, attention), spec.context_length or JUDGE_CONTEXT)


def most_batch_tokens(context: int, policy: ExecutionPolicy) -> int:
    """Most tokens of an encoder's batch, padding included."""
    return max(context, LARGEST_CHUNK // policy.layers_ahead)


def _chunk_bytes(width: int, attention: AttentionMemory, context: int) -> int:
    """Activations of the largest prefill chunk in a context of so many tokens. width: bytes per token in one layer.

    Several short prompts share a chunk, so a chunk may be longer than the context.
    """
    longest = attention.fit(LARGEST_CHUNK, 0)
    return longest * width * attention.policy.layers_ahead + attention.fitted_bytes(context)
