"""What commands find out by themselves where no server runs. It imports the server, which takes a while."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from mlxserver.api.native.library import library_list
from mlxserver.api.openai.models import model_list
from mlxserver.config.settings import Settings
from mlxserver.engine.loading import hub_search
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.library.scan import Scanner
from mlxserver.server.model_status import local_status, model_status, remote_status
from model_manager import ModelManager


async def listing(settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Models, as objects of GET /v1/models and of GET /v1/library."""
    manager = await _manager(settings)
    models = [model_status(each, manager) for each in manager.instances]
    models += [local_status(each, manager) for each in manager.library.unregistered]
    files = [local_status(each, manager) for each in manager.library.models]
    return model_list(models)["data"], library_list(files)["data"]


async def delete(key: str, settings: Settings) -> int:
    """Remove the files of a model; the bytes that they took. Raises EngineError."""
    return (await (await _manager(settings)).library.delete(key)).size_bytes


async def search(words: str, limit: int, settings: Settings) -> list[dict[str, Any]]:
    """Models of the hub, as objects of GET /v1/library/search. Raises EngineError."""
    manager = await _manager(settings)
    found = await asyncio.to_thread(hub_search.search, words, limit)
    return [asdict(remote_status(each, manager)) for each in found]


async def _manager(settings: Settings) -> ModelManager:
    """A manager that knows the models of this machine and loads none."""

    def never(*_: object) -> Any:
        raise NotImplementedError

    manager = ModelManager(settings, never, lambda: 0, estimate, scan=Scanner().scan)
    await manager.library.refresh()
    return manager
