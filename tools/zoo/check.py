"""Check of one architecture: built, fitted, and compared with mlx-lm alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from mlxserver.engine.mlx import mx

from mlxserver.engine.loading.chunk_masks import correct_chunk_masks
from mlxserver.engine.loading.fused_projections import fuse_projections
from mlxserver.engine.loading.unsupported import Unsupported, naming_what_is_missing
from mlxserver.engine.platform import cpu_layers
from mlxserver.engine.platform.expert_layers import replace_expert_layers
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.platform.short_convolutions import replace_convolutions
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.scheduler.execution import execution
from tools.zoo import models
from tools.zoo.comparison import problems


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an architecture. cache: of its decode batch, "" if it does not run here."""

    name: str
    cache: str
    text: str
    seconds: float = 0.0

    @property
    def is_wrong(self) -> bool:
        """Whether it runs and does not say what mlx-lm says."""
        return self.text != "right" and not self.text.startswith("not run")


def policy_of(*, is_padded: bool) -> ExecutionPolicy:
    """The device's policy; is_padded: with a GPU's padded slots and bucketed chunks."""
    padded = replace(current(), pad_slots=True, bucket_prefill=True, bucket_attention=True, sum_convolutions=True)
    policy = padded if is_padded else current()
    if policy.replace_kernels:
        cpu_layers.replace_functions()
    return policy


def check(name: str, policy: ExecutionPolicy) -> Result:
    """Build and compare one architecture."""
    start, cache, text = time.monotonic(), "", "right"
    try:
        with naming_what_is_missing():
            model, reference = models.build(name), models.build(name)
            for own in (model, reference):  # without this, mlx-lm's own answers are wrong on CUDA
                replace_expert_layers(own)
                correct_chunk_masks(own)  # or else mlx-lm's own depend on its chunks
            if policy.fuse_projections:
                fuse_projections(model)
            if policy.sum_convolutions:
                replace_convolutions(model)
            fitting = fitting_policy(model, policy, name)
            cache = execution(model, fitting).cache
            found = problems(model, fitting, reference)
        if found:
            text = "; ".join(f"{way}: {problem}" for way, problem in found.items())
    except Unsupported as missing:
        text = f"not run: {missing}"
    except Exception as error:  # mlx-lm's own failure, of any kind
        text = f"{type(error).__name__}: {error}"
    mx.clear_cache()
    return Result(name, cache, " ".join(text.split()), time.monotonic() - start)
