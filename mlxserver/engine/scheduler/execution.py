"""The paths that serve a model under a policy."""

from __future__ import annotations

from typing import Any

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.requests import Execution
from mlxserver.engine.scheduler.bucketed_prefill import BucketedPrefill
from mlxserver.engine.scheduler.chunks import PrefillStrategy
from mlxserver.engine.scheduler.plain_prefill import PlainPrefill


def make_prefill_strategy(model: Any, policy: ExecutionPolicy | None = None) -> PrefillStrategy:
    """The strategy for a model on this device."""
    policy = policy or current()
    is_bucketed = policy.bucket_prefill and caches.is_plain(model)
    return BucketedPrefill(model, policy) if is_bucketed else PlainPrefill(model, policy)


def execution(model: Any, policy: ExecutionPolicy) -> Execution:
    """The paths that serve a model under a policy."""
    cache = policy.batch_cache if policy.batch_cache != "slots" or caches.is_plain(model) else "merged"
    may_pad = policy.prompts == "padded" and not caches.keeps_state(model)
    return Execution(cache, may_pad, policy.compile_steps and cache == "slots")
