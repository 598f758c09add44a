"""Status of a registered model as plain values: what dialects make their model cards and progress reports from."""

from __future__ import annotations

from dataclasses import dataclass

from mlxserver.engine.requests import Execution, PolicyFacts


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is: a stage, how much of it is done, and of how much (0: not known)."""

    stage: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory in bytes that a model was expected to take before it was loaded."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """A model of the library. place: whose folder it is in. path: of the directory or file, None
    where it is not shown. Sizes are bytes.

    format: mlx or gguf. quantization: "4-bit", "Q4_K", or the type of the weights. needed_bytes: about what it takes
    in memory; fits: whether that is there: now, after_eviction, or never. From format on None for a damaged one;
    fault: what is wrong with it.
    """

    place: str
    path: str | None
    size_bytes: int
    format: str | None = None
    architecture: str | None = None
    quantization: str | None = None
    parameters: int | None = None
    context_length: int | None = None
    needed_bytes: int | None = None
    fits: str | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model on the hub, found by a search. Sizes are bytes; what its metadata do not state is None.

    updated: ISO 8601. gated: whether its terms have to be accepted. needed_bytes and fits: as of LocalFiles. is_local:
    whether it is on this machine.
    """

    id: str
    downloads: int
    likes: int
    updated: str | None
    gated: bool
    architecture: str | None
    quantization: str | None
    parameters: int | None
    size_bytes: int | None
    needed_bytes: int | None
    fits: str | None
    is_local: bool


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One registered model.

    created: seconds since 1970. status: unloaded, loading, loaded, draining or failed. memory_bytes: the weights;
    reserved_bytes: what the model holds. expires_in: seconds, None while nothing will unload it. kind, type,
    context_length (tokens), capabilities, execution, policy and estimate are None while not known. progress: of the
    load, while there is one. failure: why the last load failed. load_seconds: duration of the last load. local: its
    files, if it is one of the library. weights: how quantized ones are held, as its settings have it. kv_bits,
    kv_group_size: of its quantised KV cache, None where it has the model's own type.
    """

    key: str
    created: int
    status: str
    source: str
    kind: str | None = None
    type: str | None = None
    context_length: int | None = None
    capabilities: frozenset[str] | None = None
    execution: Execution | None = None
    policy: PolicyFacts | None = None
    memory_bytes: int = 0
    reserved_bytes: int = 0
    estimate: MemoryEstimate | None = None
    running_requests: int = 0
    queued_requests: int = 0
    aliases: tuple[str, ...] = ()
    is_pinned: bool = False
    expires_in: float | None = None
    progress: Progress | None = None
    failure: str | None = None
    load_seconds: float = 0.0
    local: LocalFiles | None = None
    weights: str = "auto"
    kv_bits: int | None = None
    kv_group_size: int | None = None
