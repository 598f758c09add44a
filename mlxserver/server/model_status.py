"""Plain values of a ModelInstance, for the dialects."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from mlxserver.api.model_status import LocalFiles, MemoryEstimate, ModelStatus, Progress, RemoteModel
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.hub_search import HubModel
from mlxserver.engine.loading.library.scan import LocalModel
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.memory_budget import MemoryBudget
from mlxserver.manager.states import LoadProgress
from mlxserver.server.keys import Permission
from model_manager import ModelManager


def model_status(instance: ModelInstance, manager: ModelManager | None = None) -> ModelStatus:
    """Status of a registered model as it is now. manager: for its files, if it is one of the library."""
    local = manager.library.with_source(instance.spec.source) if manager else None
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
        execution=facts.execution if facts else None,
        policy=facts.policy if facts else None,
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
        local=local_files(local, manager.memory) if local and manager else None,
        weights=spec.weights,
        kv_bits=spec.kv_bits,
        kv_group_size=spec.kv_group_size if spec.kv_bits else None,
    )


def local_status(model: LocalModel, manager: ModelManager) -> ModelStatus:
    """Status of a model of the library: its own, or that of the registered model that it is."""
    files = local_files(model, manager.memory)
    if instance := manager.library.registered(model):
        return replace(model_status(instance), context_length=files.context_length, local=files)
    aliases = manager.library.spec(model).aliases
    return ModelStatus(
        model.key,
        model.modified,
        "unloaded",
        str(model.path),
        kind=model.facts.kind if model.facts else None,
        context_length=files.context_length,
        aliases=aliases,
        local=files,
    )


def local_files(model: LocalModel, memory: MemoryBudget) -> LocalFiles:
    """Files of a model of the library, and whether it fits in memory."""
    facts, needed = model.facts, model.needed_bytes
    return LocalFiles(
        model.place,
        str(model.path),
        model.size_bytes,
        format=facts.format if facts else None,
        architecture=facts.architecture if facts else None,
        quantization=facts.quantization if facts else None,
        parameters=facts.parameters if facts else None,
        context_length=facts.context_length if facts else None,
        needed_bytes=needed,
        fits=None if needed is None else memory.fits(needed),
        fault=model.fault,
    )


def seen_with(permission: Permission, status: ModelStatus) -> ModelStatus:
    """The status as clients with a permission see it: without paths of this machine, unless they may name them."""
    return status if permission >= Permission.NAME_FILES else without_paths(status)


def without_paths(status: ModelStatus) -> ModelStatus:
    """The status without paths of this machine; of a source that is one the name is left."""
    local = replace(status.local, path=None) if status.local else None
    if not sources.is_path(status.source):
        return replace(status, local=local)
    path = Path(status.source).expanduser()
    failure = status.failure and status.failure.replace(f"{path.parent}/", "")
    if local and local.fault:
        local = replace(local, fault=local.fault.replace(f"{path.parent}/", ""))
    return replace(status, source=path.name, failure=failure, local=local)


def remote_status(model: HubModel, manager: ModelManager) -> RemoteModel:
    """Plain values of a model on the hub, and whether it fits in memory."""
    fits = None if model.needed_bytes is None else manager.memory.fits(model.needed_bytes)
    return RemoteModel(**asdict(model), fits=fits, is_local=manager.library.find(model.id) is not None)


def progress(load: LoadProgress) -> Progress:
    """Progress of a load."""
    return Progress(load.stage, load.done, load.total)
