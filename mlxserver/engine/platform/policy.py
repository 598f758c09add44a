"""Execution policy of a device: everything that is done differently on a CPU, on Metal and on CUDA, decided here once.

Rule 1: outside of platform/, no code asks which device it runs on; it takes a policy, by default the current one.
Rule 2: a compiled step needs padded slots, because the lengths of its sequences would be compiled into it otherwise.
Rule 3: importing this module does not import MLX.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

DeviceKind = Literal["cpu", "metal", "cuda"]
PromptSharing = Literal["padded", "unpadded", "alone"]
CacheKind = Literal["slots", "merged", "single"]
Widening = Literal["never", "without_experts", "always"]


class WeightPolicy(Enum):
    """Format of a loaded model's weights."""

    STORED = "as the checkpoint has them"
    QUANTIZED = "quantized and 16-bit ones as stored, for native kernels; others in float32"
    BFLOAT16 = "dequantized to 16 bits"
    FLOAT32 = "dequantized to float32"

    @property
    def computes_in_float32(self) -> bool:
        """Whether all values that are computed, and the KV cache, are float32."""
        return self in (WeightPolicy.FLOAT32, WeightPolicy.QUANTIZED)


_STATED = {
    "stored": WeightPolicy.STORED,
    "bfloat16": WeightPolicy.BFLOAT16,
    "float32": WeightPolicy.FLOAT32,
}


@dataclass(frozen=True, slots=True)
class ExecutionPolicy:
    """What a device does in its own way.

    compile_steps: decode steps and prefill chunks are compiled graphs, which cost no Python.
    pad_slots: decode steps compute unused slots and unused capacity too, so that shapes recur.
    bucket_prefill: prompts of models with plain KV caches are padded to chunks of few lengths.
    bucket_attention: attention of other prompts is padded to few numbers of tokens and keys (attention_shapes.py).
    sum_convolutions: short convolutions are sums, which need no plan per number of tokens (short_convolutions.py).
    round_chunks: other chunks are budgeted in powers of two.
    warm_up_all_batch_sizes: every power of two up to max_running is warmed up in idle moments, because kernels are made
        by shape; where steps are compiled, for slots of every capacity.
    fuse_projections: projections of one input become one product (loading/fused_projections.py).
    fuse_layers: decode steps compute what lies between the products and the attention of a layer in few operations
        (loading/fused_layers.py).
    weights: the format in which they are computed with.
    widen_weights: quantized weights are held in 16 bits, where memory allows it; or those of models without experts.
    async_chunks: what follows a chunk of a prompt is prepared while the device computes the chunk.
    eager_prefix_copy: what the prefix cache stores is evaluated before the next step is prepared.
    materialized_attention: attention scores exist in memory, so a chunk's length is held to them.
    decode_kernel: attention of a decode step is one kernel for sequences of all lengths (cuda_attention.py), where the
        model and its types allow it.
    sampling_kernel: tokens are drawn by one kernel (sampling_kernels.py).
    scan_kernel: recurrences of hybrid models are one kernel (recurrences.py).
    layers_ahead: layers whose intermediate values exist at the same time.
    parallel_models: decode steps of other models go on during a prefill chunk.
    replace_kernels: slow functions of MLX are replaced by those of cpu_kernels.py, cpu_attention.py and
        cpu_matmul.py.
    wire_memory: weights are kept resident, up to the working set that the device recommends.
    memory_share: the part of the device's memory that all models may take; the rest is for the system and Python.

    candidates: fields that a measurement may choose otherwise for a model (runners/measured_policies.py, and
        measured_weights.py for widen_weights).

    And what one model can't do on any device (runners/self_check.py):
    prompts: shorter prompts of a chunk are padded; or all of a chunk are of one length; or each has its own chunks.
    batch_cache: of a decode batch: slots, where all layers are plain; or mlx-lm's batched caches; or one per sequence.
    verifies: in slots, several tokens of a sequence at once are computed as they are one by one, so that drafted ones
        can be verified.
    """

    compile_steps: bool
    pad_slots: bool
    bucket_prefill: bool
    bucket_attention: bool
    sum_convolutions: bool
    round_chunks: bool
    warm_up_all_batch_sizes: bool
    fuse_projections: bool
    fuse_layers: bool
    weights: WeightPolicy
    widen_weights: Widening
    async_chunks: bool
    eager_prefix_copy: bool
    materialized_attention: bool
    decode_kernel: bool
    sampling_kernel: bool
    scan_kernel: bool
    layers_ahead: int
    parallel_models: bool
    replace_kernels: bool
    wire_memory: bool
    memory_share: float
    candidates: tuple[str, ...] = ()
    prompts: PromptSharing = "padded"
    batch_cache: CacheKind = "slots"
    verifies: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for compiled steps without padded slots."""
        if self.compile_steps and not self.pad_slots:
            raise ValueError("compiled steps need padded slots")

    def with_weights(
        self, setting: Literal["auto", "stored", "bfloat16", "float32"], *, is_shared: bool = False
    ) -> ExecutionPolicy:
        """The policy with the weights that a model's setting states; "auto" states none.

        is_shared: ranks share the model, whose divided layers have no native kernels.
        """
        if setting != "auto":
            return replace(self, weights=_STATED[setting])
        is_divided = is_shared and self.weights is WeightPolicy.QUANTIZED
        return replace(self, weights=WeightPolicy.FLOAT32) if is_divided else self

    def widens(self, has_experts: bool) -> bool:
        """Whether quantized weights of a model, with experts or without, are to be held in 16 bits."""
        return self.widen_weights == "always" or (self.widen_weights == "without_experts" and not has_experts)

    def may_speculate(self, setting: Literal["auto", "off", "always"]) -> bool:
        """Whether tokens may be drafted at a setting.

        "auto" is off where steps are compiled and none is warmed up: verifying ones would be while requests wait.
        """
        has_shapes = not self.compile_steps or self.warm_up_all_batch_sizes
        return setting == "always" or (setting == "auto" and has_shapes)

    def may_draft_by_model(self, setting: Literal["auto", "off", "always"]) -> bool:
        """Whether a draft model may draft at a setting: "auto" uses none where steps are compiled, as its own are not
        warmed up.
        """
        return self.may_speculate(setting) and (setting == "always" or not self.compile_steps)

    def with_fields(self, fields: Mapping[str, bool]) -> ExecutionPolicy:
        """The policy with these fields. A field that they leave open follows them, where it has to (rule 2).

        Raises ValueError if they contradict each other.
        """
        implied = {}
        if fields.get("compile_steps"):
            implied["pad_slots"] = True
        if fields.get("pad_slots") is False:
            implied["compile_steps"] = False
        return replace(self, **{**implied, **fields})  # type: ignore[arg-type]


# MLX's compiled functions cost seconds of the C++ compiler per shape on a CPU, too long to be measured between two
# requests. Its float16 and quantized products are some thirty times slower there than those of float32: quantized
# weights are dequantized, unless native kernels are built (cpu_stored.py), which are faster than both. Time grows
# with every slot and token that is computed. MLX's CPU backend runs up to two hundred operations ahead, some four
# layers, and an array that is written to before its copy has been computed is copied as a whole.
CPU = ExecutionPolicy(
    compile_steps=False,
    pad_slots=False,
    bucket_prefill=False,
    bucket_attention=False,
    sum_convolutions=False,
    round_chunks=False,
    warm_up_all_batch_sizes=False,
    fuse_projections=False,
    fuse_layers=False,
    weights=WeightPolicy.FLOAT32,
    widen_weights="never",
    async_chunks=False,
    eager_prefix_copy=True,
    materialized_attention=True,
    decode_kernel=False,
    sampling_kernel=False,
    scan_kernel=False,
    layers_ahead=4,
    parallel_models=True,
    replace_kernels=sys.platform == "linux",
    wire_memory=False,
    memory_share=0.75,
    candidates=("fuse_projections",),
)
# A CPU with native kernels.
NATIVE = replace(CPU, weights=WeightPolicy.QUANTIZED, sampling_kernel=True, scan_kernel=True)
# A GPU prefers few shapes that recur. Memory is shared with the whole machine here: weights in 16 bits, which take four
# times as much of it, and of its bandwidth, are no candidate.
METAL = ExecutionPolicy(
    compile_steps=False,
    pad_slots=True,
    bucket_prefill=False,
    bucket_attention=False,
    sum_convolutions=False,
    round_chunks=True,
    warm_up_all_batch_sizes=True,
    fuse_projections=False,
    fuse_layers=False,
    weights=WeightPolicy.STORED,
    widen_weights="never",
    async_chunks=False,
    eager_prefix_copy=False,
    materialized_attention=False,
    decode_kernel=False,
    sampling_kernel=False,
    scan_kernel=False,
    layers_ahead=1,
    parallel_models=False,
    replace_kernels=False,
    wire_memory=True,
    memory_share=0.9,
    candidates=("compile_steps", "pad_slots", "fuse_projections"),
)
# A data centre GPU is bound by its host, which compiled steps and fewer, larger operations relieve. MLX's products of
# quantized weights are slower there than those of 16 bits (8B, 4 bits: 1.3 times for one sequence, 8 times for
# sixteen), but for experts, whose decode steps read few of them (0.6 times for sixteen): so until that is measured.
CUDA = ExecutionPolicy(
    compile_steps=True,
    pad_slots=True,
    bucket_prefill=True,
    bucket_attention=True,
    sum_convolutions=True,
    round_chunks=True,
    warm_up_all_batch_sizes=True,
    fuse_projections=True,
    fuse_layers=True,
    weights=WeightPolicy.STORED,
    widen_weights="without_experts",
    async_chunks=True,
    eager_prefix_copy=False,
    materialized_attention=False,
    decode_kernel=True,
    sampling_kernel=True,
    scan_kernel=True,
    layers_ahead=1,
    parallel_models=False,
    replace_kernels=False,
    wire_memory=False,
    memory_share=0.9,
    candidates=("decode_kernel", "fuse_layers", "compile_steps", "fuse_projections", "widen_weights"),
)


def policy_for(kind: DeviceKind) -> ExecutionPolicy:
    """The policy of a kind of device."""
    return {"cpu": CPU, "metal": METAL, "cuda": CUDA}[kind]


@functools.cache
def current() -> ExecutionPolicy:
    """The policy of the device in use."""
    from mlxserver.engine.platform import device
    from mlxserver.engine.platform.native.extension import native

    policy = policy_for(device.describe().kind)
    return NATIVE if policy is CPU and native() else policy
