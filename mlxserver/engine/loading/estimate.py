"""Memory estimate of a model before it is loaded, and the memory budget of all models. All sizes are bytes.

Rule 1: an estimate reads configurations and sizes of files, never weights; nothing is computed.
Rule 2: an estimate is an upper bound: KV cache beyond it is claimed from the pool (engine/kv_pool.py), and prefill
        chunks are no longer than what was counted (platform/attention_memory.py).
Rule 3: importing this module does not import MLX: the manager needs only its types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxserver.config.settings import Kind, ModelSpec
from mlxserver.engine.errors import LoadFailed, SourceInvalid, one_line
from mlxserver.engine.loading.metadata import CheckpointMetadata, attention_heads, context_length
from mlxserver.engine.loading.sources import checkpoint_metadata
from mlxserver.engine.loading.unsupported import Unsupported, naming_what_is_missing
from mlxserver.engine.platform.attention_memory import LARGEST_CHUNK, STATE_REACH, AttentionMemory
from mlxserver.engine.platform.native.formats import has_kernel
from mlxserver.engine.platform.policy import ExecutionPolicy, WeightPolicy, current

if TYPE_CHECKING:
    from mlxserver.engine.loading.encoder_architecture import EncoderArchitecture
    from mlxserver.engine.loading.vision_architecture import VisionArchitecture

# Tokens of a shared model's KV cache by default, which all ranks reserve: some conversations of ordinary length.
DEFAULT_CACHE_TOKENS = 32_768
JUDGE_CONTEXT = 8192  # of Qwen3-Reranker (huggingface.co/Qwen/Qwen3-Reranker-0.6B), whose positions go further
Format = Mapping[str, Any]
_TYPE_BYTES = {"float32": 4}  # of a value; every other type that checkpoints state has two
# Memory of a model beside its arrays, whatever its size: its tokenizer, and what MLX keeps for the next arrays.
_RUNTIME_BYTES = 64 << 20
_ENCODER_RUNTIME_BYTES = 32 << 20  # the same of an encoder, which compiles nothing and samples nothing
_FEWER_BITS = 1.1  # times as large in 16 bits: weights that are stored in fewer
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

    widened: of the weights in 16 bits, where the device computes faster with them than as they are stored; 0 elsewhere.
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
    if spec.drafter is None or spec.speculation == "off":
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
    value_bytes = _value_bytes(metadata, policy)
    heads = attention_heads(metadata.config, *architecture.arguments)
    dequantized = architecture.widest_layer * value_bytes if kv else 0
    attention = AttentionMemory(heads, policy, 0 if architecture.layers else STATE_REACH, dequantized)
    own = limits(spec, context_length(spec.key, metadata.config, *architecture.arguments))
    values, in_layers, stored = architecture.weights, architecture.in_layers, metadata.stored_bytes
    if vision:
        values, in_layers = values + vision.weights, in_layers + vision.in_layers
        stored += metadata.tower_bytes
    if spec.adapter:
        in_layers = 0  # those that it is added to become float32
    may_widen = policy.widen_weights and spec.weights == "auto" and not (spec.shard or architecture.has_experts)
    adapter = 0 if policy.weights is WeightPolicy.FLOAT32 else _adapter_bytes(spec)  # which is fused there
    found = Estimate(
        weights=_weight_bytes(values, in_layers, stored, policy.weights, metadata, has_experts=architecture.has_experts)
        + adapter,
        cache=architecture.cache_bytes(own.reserved, own.sequences, value_bytes, kv),
        activations=max(
            _chunk_bytes(architecture.width * value_bytes, attention, own.context),
            vision.activation_bytes(value_bytes, policy) if vision else 0,
        )
        + (vision.kept_bytes if vision else 0)
        + (attention.bytes_beyond(own.context) if spec.shard else 0)  # or else a long prompt claims it
        + spec.max_running * architecture.vocab * 4 * _SAMPLING_ARRAYS
        + _RUNTIME_BYTES,
        widened=values * 2 + adapter if may_widen and _has_fewer_bits(values, stored) else 0,
    )
    return found, own.context


def _weight_bytes(
    values: int,
    in_layers: int,
    stored: int,
    weights: WeightPolicy,
    metadata: CheckpointMetadata,
    *,
    has_experts: bool = False,
) -> int:
    """Bytes of so many weights in their loaded format. stored: in their stored one. in_layers: see Architecture."""
    if weights is WeightPolicy.FLOAT32:
        return values * 4
    if weights is WeightPolicy.QUANTIZED:
        formats = _quantization(metadata.config)
        return _native_bytes(values, in_layers, stored, metadata.config, formats, has_experts=has_experts)
    return values * 2 if weights is WeightPolicy.BFLOAT16 and _has_fewer_bits(values, stored) else stored


def _native_bytes(
    values: int, in_layers: int, stored: int, config: Mapping[str, Any], formats: Sequence[Format], *, has_experts: bool
) -> int:
    """Bytes of so many weights where native kernels compute with those of layers, and the others are float32.

    How many are quantized follows from the stored size. Where some have other bits than most, it is an upper bound.
    """
    width = _float_bytes(config)
    if width == 4:
        return min(stored, values * 4)
    floats: float = values
    if formats:
        if has_experts or not all(_has_kernel(part, formats[0]) for part in formats):
            return values * 4
        each = formats[0]["bits"] / 8 + 2 * width / formats[0]["group_size"]
        floats = max(0, stored - values * each) / (width - each)
    return min(values * 4, int(stored + min(floats, values - in_layers) * (4 - width)))


def _quantization(config: Mapping[str, Any]) -> Sequence[Format]:
    """The formats of quantized weights that a config.json states, the general one first; none without any."""
    stated = config.get("quantization") or config.get("quantization_config")
    return [stated, *(part for part in stated.values() if isinstance(part, Mapping))] if stated else []


def _has_kernel(format: Format, default: Format) -> bool:
    """Whether quantized weights that a config.json describes have a native kernel."""
    bits, group_size = (format.get(name, default.get(name)) for name in ("bits", "group_size"))
    return has_kernel(str(format.get("mode", default.get("mode", "affine"))), bits, group_size)


def _has_fewer_bits(values: int, stored: int) -> bool:
    """Whether weights are stored in fewer than 16 bits."""
    return values * 2 > stored * _FEWER_BITS


def _value_bytes(metadata: CheckpointMetadata, policy: ExecutionPolicy) -> int:
    """Bytes of a computed value."""
    return 4 if policy.weights.computes_in_float32 else _float_bytes(metadata.config)


def _float_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of a stored float."""
    return _TYPE_BYTES.get(str(_stated_type(config)), 2)


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
    value_bytes = _value_bytes(metadata, policy)
    attention = AttentionMemory(architecture.heads, policy)
    longest = judge_context if architecture.is_judge else embedding_context
    context = longest(spec, architecture.context, attention)
    most = most_batch_tokens(context, policy)
    return Estimate(
        weights=_weight_bytes(
            architecture.weights, architecture.in_layers, metadata.stored_bytes, policy.weights, metadata
        ),
        cache=0,
        activations=most * architecture.activation_bytes(value_bytes, policy)
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


def _stated_type(config: Mapping[str, Any]) -> object:
    for part in (config, config.get("text_config") or {}):
        if stated := part.get("torch_dtype") or part.get("dtype"):
            return stated
    return None


def _adapter_bytes(spec: ModelSpec) -> int:
    """Size of the adapter, which stays beside quantized weights."""
    if spec.adapter is None:
        return 0
    file = Path(spec.adapter).expanduser() / "adapters.safetensors"
    return file.stat().st_size if file.is_file() else 0
