"""Check whether a model computes several tokens of a sequence at once as it does one by one."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.scheduler.speculation_controller import SIZES

log = logging.getLogger("engine")

_TOKENS, _PROMPTS = SIZES[0], (5, 9)
_TRIALS = 4  # in 16 bits a close choice of experts may turn out otherwise, but not always
_MOST_DIFFERENCE = 0.1  # of logits, relative to their spread


def verifies(model: Any, policy: ExecutionPolicy) -> bool:
    """Whether a model's logits of several tokens at once, behind unlike prompts, are those of one by one."""
    policy = replace(policy, compile_steps=False)
    try:
        return any(_difference(model, policy, seed) <= _MOST_DIFFERENCE for seed in range(_TRIALS))
    except Exception:  # of any kind: it is foreign code, given what it may not know
        log.info("several tokens at once", exc_info=True)
        return False


def _difference(model: Any, policy: ExecutionPolicy, seed: int) -> float:
    """Largest root mean square difference of the logits, relative to their spread."""
    vocab = int(model(mx.zeros((1, 1), dtype=mx.uint32)).shape[-1])
    tokens = [[(1 + 131 * n + 7 * i * (i + 3) + 977 * seed) % vocab for i in range(16)] for n in range(len(_PROMPTS))]
    prefilled = [caches.new_cache(model) for _ in _PROMPTS]
    for cache, own, length in zip(prefilled, tokens, _PROMPTS, strict=True):
        model(mx.array([own[:length]]), cache=cache)
    batches = [SlotCache(model, policy) for _ in range(2)]
    for batch in batches:
        batch.join(prefilled)
    inputs = mx.array([own[length:][:_TOKENS] for own, length in zip(tokens, _PROMPTS, strict=True)], dtype=mx.uint32)
    together = batches[0].verify(inputs).astype(mx.float32)
    single = mx.stack([batches[1].advance(inputs[:, n]) for n in range(_TOKENS)], axis=1).astype(mx.float32)
    is_known = mx.isfinite(single)
    difference = mx.where(is_known, together - single, 0)
    spread = mx.maximum(mx.std(mx.where(is_known, single, 0), axis=-1), 1e-3)
    worst = mx.max(mx.sqrt(mx.mean(difference**2, axis=-1)) / spread)
    return cast(float, mx.where(mx.isnan(worst), mx.inf, worst).item())
