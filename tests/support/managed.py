"""A model manager over scripted engines, with memory for so many models."""

from contextlib import asynccontextmanager

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.loading.estimate import Estimate
from model_manager import ModelManager
from tests.support.scripted_engine import FACTS, Factory, read, request

ONE = 10**6  # what each model takes


def specs(keys="abc", **fields):
    return tuple(ModelSpec(key, f"source-{key}", **fields) for key in keys)


@asynccontextmanager
async def managed(models=None, places=1, measure_arrays=lambda: 0, **settings):
    """A manager whose memory holds so many of its models."""
    factory = Factory()
    known = Settings(models=specs() if models is None else models, memory_limit=places * ONE, **settings)
    estimate = Estimate(FACTS.weight_bytes, ONE - FACTS.weight_bytes, 0)
    manager = ModelManager(known, factory.start, lambda: 0, lambda spec: estimate, measure_arrays)
    try:
        yield manager, factory
    finally:
        factory.gate.set()
        for runtime in factory.runtimes:
            runtime.batch.gate.set()
        await manager.close(0)
        assert manager.memory.reserved == 0


async def answered(manager, key, max_tokens=3, keep_alive=None):
    generation = await manager.resolve(key).generate(request("hello", max_tokens), keep_alive)
    await generation.accepted()
    return await read(generation)


def states(manager):
    return " ".join(f"{i.key}:{i.status}" for i in manager.instances if i.status != "unloaded")


def status_is(manager, key, status):
    return lambda: manager.instance(key).status == status
