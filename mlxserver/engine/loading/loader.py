"""Loader: weights, tokenizer and facts of one model, read into memory.

Rule 1: load() runs on the thread that will use the model.
Rule 2: it gives a whole model or raises LoadFailed with one line that names a remedy; then nothing stays in memory.
Rule 3: code in a checkpoint is never run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_adapters, load_model, load_tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedConfig

from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.sampling_params import MODEL_DEFAULTS
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache.caches import weight_bytes
from mlxserver.engine.loading import estimate, mtp
from mlxserver.engine.loading.checkpoint_files import checked, read_object
from mlxserver.engine.loading.chunk_masks import correct_chunk_masks
from mlxserver.engine.loading.fused_layers import fuse_layers
from mlxserver.engine.loading.fused_projections import fuse_projections
from mlxserver.engine.loading.kv_format import kv_format, quantize_kv
from mlxserver.engine.loading.metadata import context_length, model_arguments, vocab_size
from mlxserver.engine.loading.outcome import complete_or_nothing, naming
from mlxserver.engine.loading.quantized_products import QuantizedProduct, half_type, quantized_products
from mlxserver.engine.loading.sharding import Divide
from mlxserver.engine.loading.sources import Progress, recommended_sampling, resolve, silent
from mlxserver.engine.loading.turn_ends import find_turn_ends
from mlxserver.engine.loading.unsupported import naming_what_is_missing
from mlxserver.engine.platform import cpu_decoder, cpu_layers, cpu_stored, device, recurrences
from mlxserver.engine.platform.expert_layers import replace_expert_layers
from mlxserver.engine.platform.policy import ExecutionPolicy, WeightPolicy, current
from mlxserver.engine.platform.short_convolutions import replace_convolutions

log = logging.getLogger("engine")

_NVFP4_LARGEST = 448 * 6  # a global scale is the largest value; stored values times stored scales reach this one
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
READ_AT_ONCE = 64 << 20  # bytes of weights between two reports; an aborted load ends at the next one


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    config: config.json as mlx-lm reads it. path: the local MLX directory. limits: of its requests.
    generation_defaults: the sampling parameters that the model's makers recommend. weight_bytes: in memory. products:
    those with weights that the checkpoint has quantized, by shape.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: Mapping[str, Any]
    path: Path
    limits: estimate.Limits
    generation_defaults: Mapping[str, float]
    weight_bytes: int
    products: Mapping[QuantizedProduct, int] = field(default_factory=dict)

    @property
    def context_length(self) -> int:
        """The longest served context in tokens."""
        return self.limits.context


def load(
    spec: ModelSpec,
    *,
    progress: Progress | None = None,
    divide: Divide | None = None,
    policy: ExecutionPolicy | None = None,
) -> LoadedModel:
    """Fetch, read and prepare a model. Blocks for as long as that takes. Raises LoadFailed.

    progress: called with "downloading", "converting" and "reading" (bytes of weights). divide: reduces a model to a
    rank's share. policy: by default the current one.
    """
    policy = (policy or current()).with_weights(spec.weights, is_shared=divide is not None)
    return complete_or_nothing(spec, lambda: _load(spec, progress or silent, divide, policy))


def disable_tokenizer_cache(tokenizer: TokenizerWrapper) -> None:
    """Disable a tokenizer's cache of words: 400,000 tokens per second on a CPU core instead of 550,000."""
    # It would keep some ten thousand words per thread that uses it, for as long as that thread lives: unlike the
    # tokenizer, a thread stays (worker/thread_pool.py), and every load would add megabytes to it.
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None and isinstance(core.model, BPE):
        core.model._resize_cache(0)


def _load(spec: ModelSpec, report: Progress, divide: Divide | None, policy: ExecutionPolicy) -> LoadedModel:
    if policy.wire_memory:
        device.set_wired_limit_once()
    path = resolve(spec.source, progress=report, weights=policy.weights)
    report("reading", 0, 0)
    with contextlib.ExitStack() as stack:
        with naming(f"the tokenizer in {path} can't be read"):
            files = stack.enter_context(checked(path))
        return _read(spec, path, files, report, divide, policy)


def _read(
    spec: ModelSpec, path: Path, files: Path, report: Progress, divide: Divide | None, policy: ExecutionPolicy
) -> LoadedModel:
    """The model in `path`. files: that directory, or a corrected copy of it."""
    with naming(f"the model in {path} can't be read"), naming_what_is_missing():
        classes = mtp.classes_with_head if mtp.is_wanted(spec, policy) else mtp.classes_without_head
        model, config = load_model(files, lazy=True, get_model_classes=classes, trust_remote_code=False)
    quantize_kv(model, kv_format(spec))
    if spec.adapter is not None:
        with naming(f"the adapter {spec.adapter!r} can't be used with this model"):
            model = load_adapters(model, str(Path(spec.adapter).expanduser()))
    products = quantized_products(model)
    with naming(f"the weights in {path} can't be used"):
        model = prepare(model, report, policy, divide)
    with naming(f"the tokenizer in {path} can't be read"):
        tokenizer = read_tokenizer(files)
        disable_tokenizer_cache(tokenizer)
        tokenizer.eos_token_ids = set(find_turn_ends(tokenizer, path, vocab_size(config) or len(tokenizer)))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=config,
        path=path,
        limits=estimate.limits(spec, context_length(spec.key, config, *model_arguments(model))),
        generation_defaults={**recommended_sampling(spec.source), **generation_defaults(path)},
        weight_bytes=weight_bytes(model),
        products=products,
    )


def read_tokenizer(path: Path) -> TokenizerWrapper:
    """The tokenizer of a directory, without ends of a turn.

    transformers reads config.json first, and refuses some that only mlx-lm knows: none is needed then.
    """
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        return load_tokenizer(path, options, eos_token_ids=[])
    except Exception as refusal:
        try:
            return load_tokenizer(path, options | {"config": PreTrainedConfig()}, eos_token_ids=[])
        except Exception:
            raise refusal from None


def prepare(model: nn.Module, report: Progress, policy: ExecutionPolicy, divide: Divide | None = None) -> nn.Module:
    """The model in the policy's form, evaluated. Progress is reported in bytes of loaded weights."""
    model = _with_adapters_fused(_in_weight_format(model, policy.weights))
    if divide:
        divide(model)
    elif policy.fuse_projections:
        fuse_projections(model)
    if policy.fuse_layers and not divide:
        fuse_layers(model)
    replace_expert_layers(model)
    correct_chunk_masks(model)
    if policy.sum_convolutions:
        replace_convolutions(model)
    if policy.scan_kernel:
        recurrences.replace_functions()
    if policy.replace_kernels:
        cpu_layers.replace_functions()
        cpu_layers.replace_layers(model)
        cpu_decoder.replace_layers(model)
    model.eval()
    _read_weights(model, report)
    return model


def _in_weight_format(model: nn.Module, weights: WeightPolicy) -> nn.Module:
    """The model with its weights in the format that it computes with."""
    if weights is WeightPolicy.FLOAT32:
        model.set_dtype(mx.float32)  # first the scales, or else the products of 16-bit ones would be rounded
        model = _dequantized(model)
        model.set_dtype(mx.float32)  # and the weights of formats whose scales are no floats (mxfp4)
    elif weights is WeightPolicy.QUANTIZED:
        cpu_stored.replace_layers(model)
        _dequantize_others(model)
    elif weights is WeightPolicy.BFLOAT16:
        model = _widened(model)
    return model


def _with_adapters_fused(model: nn.Module) -> nn.Module:
    """The model with adapters added to the weights that they fit."""
    fused = [(name, layer.fuse()) for name, layer in model.named_modules() if _is_fusable(layer)]
    if fused:
        model.update_modules(tree_unflatten(fused))
    return model


def _read_weights(model: nn.Module, report: Progress) -> None:
    """Evaluate the weights, in pieces."""
    parameters = [array for _, array in tree_flatten(model.parameters())]
    total, done, pending = sum(array.nbytes for array in parameters), 0, 0
    for n, array in enumerate(parameters):
        pending += array.nbytes
        if pending >= READ_AT_ONCE or n == len(parameters) - 1:
            mx.eval(parameters[: n + 1])
            done, pending = done + pending, 0
            report("reading", done, total)


def _dequantize_others(model: nn.Module) -> None:
    """Dequantize the layers that no native kernel computes with, to float32."""
    named = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _QUANTIZED)]
    names = [name for name, layer in named if not cpu_stored.is_replaced(layer)]
    others = nn.Module()
    others.layers = [layer for _, layer in named if not cpu_stored.is_replaced(layer)]
    if names:
        _dequantized(others).set_dtype(mx.float32)
        model.update_modules(tree_unflatten(list(zip(names, others.layers, strict=True))))


def _dequantized(model: nn.Module) -> nn.Module:
    """The model with dequantized layers; nvfp4's scale of each expert, which mlx-lm leaves out, included."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedSwitchLinear)]
    scales = {name: layer.global_scale for name, layer in layers if layer.global_scale is not None}
    model = dequantize_model(model)
    for name, layer in model.named_modules():
        if name in scales:
            layer.weight = layer.weight * (scales[name] / _NVFP4_LARGEST)[:, None, None]
    return model


def _widened(model: nn.Module) -> nn.Module:
    """The model with quantized weights in 16 bits. They are dequantized in float32, so that each is rounded once."""
    types = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _QUANTIZED):
            types[name] = half_type(layer)
            layer.set_dtype(mx.float32)
    model = _dequantized(model)
    for name, layer in model.named_modules():
        if name in types:
            layer.set_dtype(types[name])
    return model


def _is_fusable(layer: nn.Module) -> bool:
    """Whether the layer's adapter can be added to its weight. A quantized weight would lose it to rounding."""
    if not hasattr(layer, "fuse"):
        return False
    wrapped = getattr(layer, "linear", None) or getattr(layer, "embedding", None)
    return wrapped is not None and not hasattr(wrapped, "bits")


def generation_defaults(path: Path) -> dict[str, float]:
    """Sampling parameters that the model's generation_config.json recommends, within the bounds of a request's.

    What is out of bounds is left out, with a warning. `do_sample` false without a temperature is greedy.
    """
    try:
        stated = read_object(path / "generation_config.json") or {}
    except ValueError:
        return {}  # already reported (checkpoint_files.py)
    recommended = {}
    for name, setting in MODEL_DEFAULTS.items():
        if (value := stated.get(name)) is not None:
            if setting.type is int and isinstance(value, float) and value.is_integer():
                value = int(value)  # JSON has one type of number, as a request's
            try:
                recommended[name] = setting.check(f"{path / 'generation_config.json'}: {name}", value)
            except ConfigInvalid as error:
                log.warning("%s It is left out.", error)
    if stated.get("do_sample") is False and stated.get("temperature") is None:
        recommended["temperature"] = 0.0
    return recommended
