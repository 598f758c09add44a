"""How much memory a model will take, before it is loaded; and how much all models may take. All sizes are bytes.

Rule 1: an estimate reads configurations and sizes of files, never weights; nothing is computed.
Rule 2: what an estimate promises is kept: the batcher holds no more than `cache_tokens` (scheduler/scheduler.py), and a
        prompt's chunks are no longer than what was counted (platform/attention_memory.py).

The architecture itself is asked: mlx-lm builds it from its config.json with arrays that are never evaluated, and one
lazy forward step tells the shapes of its cache. So every architecture that can be loaded can be estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed, SourceInvalid, one_line
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading.metadata import attention_heads, context_length
from mlxserver.engine.loading.sources import checkpoint_metadata
from mlxserver.engine.platform import device, environment
from mlxserver.engine.platform.attention_memory import LARGEST_CHUNK, AttentionMemory
from mlxserver.engine.platform.policy import ExecutionPolicy, WeightPolicy, current

# Tokens that a model's cache holds unless it is told otherwise: some conversations of ordinary length at once.
DEFAULT_CACHE_TOKENS = 32_768
_BYTES = {"float32": 4}
# What a model holds beside its arrays, whatever its size: its tokenizer, and what MLX keeps for the next arrays.
_RUNTIME = 64 << 20
_SAMPLING_ARRAYS = 4  # of [rows, vocab] in float32 at once: logits, probabilities, their sums, a mask


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests to a model may take, in tokens: one of them, and the cache of all together."""

    context: int
    cache_tokens: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model takes: its weights as they are held, its cache when full, and a step's intermediate values."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture tells of itself, in numbers of values rather than bytes.

    layers: for each layer that keeps tokens, values a token and the most tokens that it keeps of one row (0: all).
    row_values: what a row keeps whatever its length. width: values a token brings forth in the widest layer.
    """

    weights: int
    layers: tuple[tuple[int, int], ...]
    row_values: int
    width: int
    vocab: int

    def cache_values(self, tokens: int, rows: int) -> int:
        """Values that the cache holds when it is full."""
        return rows * self.row_values + sum(
            values * (min(tokens, rows * window) if window else tokens) for values, window in self.layers
        )


def budget(limit: int, policy: ExecutionPolicy | None = None) -> int:
    """The memory that all models may take: the limit, or a share of the device's if it is 0."""
    return limit or int(device.describe().memory_bytes * (policy or current()).memory_share)


def limits(spec: ModelSpec, own_context: int) -> Limits:
    """The limits of a model whose own context is so long. A longer context is served when it is asked for."""
    context = spec.context_length or own_context
    most = max(DEFAULT_CACHE_TOKENS, spec.context_length or 0)
    cache_tokens = spec.cache_tokens or min(most, context * spec.max_running)
    return Limits(min(context, cache_tokens), cache_tokens)


def estimate(spec: ModelSpec, policy: ExecutionPolicy | None = None) -> Estimate:
    """What the model will take on this device. Blocks: it reads some files, or asks the hub. Raises LoadFailed.

    On a thread that has a stream of MLX (worker/thread_pool.py), or else one is made that stays.
    """
    policy = policy or current()
    try:
        model = checkpoint_metadata(spec.source, policy.weights)
        anatomy = inspect_architecture(model.config)
    except SourceInvalid as error:
        raise LoadFailed(spec.key, str(error)) from None
    except Exception as error:  # what a broken config.json does to an architecture can be anything
        text = one_line(error)
        raise LoadFailed(spec.key, f"its config.json can't be used: {type(error).__name__}: {text}") from None
    is_float32 = policy.weights is WeightPolicy.FLOAT32
    size = 4 if is_float32 else _BYTES.get(str(_stated_type(model.config)), 2)
    attention = AttentionMemory(attention_heads(model.config), policy)
    limit = limits(spec, context_length(spec.key, model.config))
    return Estimate(
        weights=anatomy.weights * 4 if is_float32 else model.stored_bytes + _adapter_bytes(spec),
        cache=anatomy.cache_values(limit.cache_tokens, spec.max_running) * size,
        activations=_chunk_bytes(anatomy.width * size, attention, limit.context)
        + spec.max_running * anatomy.vocab * 4 * _SAMPLING_ARRAYS
        + _RUNTIME,
    )


def inspect_architecture(config: Mapping[str, Any]) -> Architecture:
    """The anatomy of the architecture that a config.json describes. Raises whatever mlx-lm does for a wrong one."""
    environment.install_kernels()
    model_class, arguments = _get_classes(dict(config))
    model = model_class(arguments.from_dict(dict(config)))
    cache = make_prompt_cache(model)
    logits = model(mx.zeros((1, 1), dtype=mx.uint32), cache=cache)
    parameters = [array for _, array in tree_flatten(model.parameters())]
    vocab = int(logits.shape[-1])
    outputs = sum(array.shape[-2] for array in parameters if array.ndim >= 2 and array.shape[-2] != vocab)
    layers, row_values = [], 0
    for layer in caches.flat(cache):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, mx.array) and isinstance(values, mx.array):
            a_token = keys.size // keys.shape[2] + values.size // values.shape[2]
            layers.append((a_token, int(getattr(layer, "max_size", None) or 0)))
        else:
            row_values += sum(array.size for _, array in tree_flatten(layer.state) if isinstance(array, mx.array))
    mx.random.seed(0)  # or else the weights, which nobody computes, would stay in this thread's random state
    return Architecture(
        sum(array.size for array in parameters), tuple(layers), row_values, outputs // len(cache), vocab
    )


def _chunk_bytes(width: int, attention: AttentionMemory, context: int) -> int:
    """What a chunk of prompts takes for a while, at the worst place of a context. width: bytes a token in one layer.

    Several short prompts go together, so a chunk may be longer than the context.
    """
    longest = attention.fit(LARGEST_CHUNK, 0)
    return longest * width * attention.policy.layers_ahead + attention.max_bytes(context)


def _stated_type(config: Mapping[str, Any]) -> object:
    for part in (config, config.get("text_config") or {}):
        if stated := part.get("torch_dtype") or part.get("dtype"):
            return stated
    return None


def _adapter_bytes(spec: ModelSpec) -> int:
    """An adapter stays beside the weights where they are quantized."""
    if spec.adapter is None:
        return 0
    file = Path(spec.adapter).expanduser() / "adapters.safetensors"
    return file.stat().st_size if file.is_file() else 0
