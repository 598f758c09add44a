"""A model manager over scripted engines, with memory for `capacity` models."""

from contextlib import asynccontextmanager

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.loading.estimate import Estimate
from model_manager import ModelManager
from tests.support.scripted_engine import FACTS, Factory, read, request

ONE = 10**6  # bytes that each model takes
ESTIMATE = Estimate(FACTS.weight_bytes, ONE - FACTS.weight_bytes, 0)


def specs(keys="abc", **fields):
    return tuple(ModelSpec(key, f"source-{key}", **fields) for key in keys)


@asynccontextmanager
async def managed(
    models=None,
    capacity=1,
    measure_arrays=lambda: 0,
    measure_memory=lambda: 0,
    estimate=lambda spec: ESTIMATE,
    **settings,
):
    """A manager whose memory holds `capacity` of its models, and the factory of their engines."""
    factory = Factory()
    known = Settings(models=specs() if models is None else models, memory_limit=capacity * ONE, **settings)
    manager = ModelManager(known, factory.start, measure_memory, estimate, measure_arrays)
    try:
        yield manager, factory
    finally:
        factory.gate.set()
        for runner in factory.runners:
            runner.batch.gate.set()
        await manager.close(0)
        assert manager.memory.reserved == 0


async def answered(manager, key, max_tokens=3, idle_timeout=None):
    generation = await manager.resolve(key).generate(request("hello", max_tokens), idle_timeout)
    await generation.accepted()
    return await read(generation)


def states(manager):
    return " ".join(f"{i.key}:{i.status}" for i in manager.instances if i.status != "unloaded")


def status_is(manager, key, status):
    return lambda: manager.instance(key).status == status
