"""Plain values of a ModelInstance, for the dialects."""

from __future__ import annotations

from mlxserver.api.model_status import Execution, MemoryEstimate, ModelStatus, Progress
from mlxserver.engine import requests
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.states import LoadProgress


def model_status(instance: ModelInstance) -> ModelStatus:
    """Status of a registered model as it is now."""
    spec, facts, estimate = instance.spec, instance.facts, instance.estimate
    return ModelStatus(
        spec.key,
        instance.created,
        instance.status,
        spec.source,
        kind=instance.kind,
        type=facts.type if facts else spec.type,
        context_length=facts.context_length if facts else spec.context_length,
        capabilities=facts.capabilities if facts else None,
        execution=_execution(facts.execution) if facts and facts.execution else None,
        memory_bytes=facts.weight_bytes if facts else 0,
        reserved_bytes=instance.reserved_bytes,
        estimate=MemoryEstimate(estimate.weights, estimate.cache, estimate.activations) if estimate else None,
        running_requests=instance.running,
        queued_requests=instance.waiting,
        aliases=instance.aliases,
        is_pinned=spec.pin,
        expires_in=instance.expires_in,
        progress=progress(instance.load_progress) if instance.status == "loading" else None,
        failure=instance.failure_reason,
        load_seconds=instance.load_seconds,
    )


def _execution(paths: requests.Execution) -> Execution:
    return Execution(paths.cache, paths.padded_prefill, paths.compiled)


def progress(load: LoadProgress) -> Progress:
    """Progress of a load."""
    return Progress(load.stage, load.done, load.total)
