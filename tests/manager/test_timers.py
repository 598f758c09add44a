"""Idle timeouts of models, from settings and from requests, and the backoff after failures."""

from dataclasses import replace

from mlxserver.config.settings import ModelSpec
from tests.support.managed import answered, managed, specs, status_is
from tests.support.scripted_engine import request, until, within_deadline


@within_deadline
async def test_an_idle_model_is_unloaded_after_its_ttl():
    async with managed(specs("a", ttl=1.0)) as (manager, _):
        await answered(manager, "a")
        assert manager.instance("a").expires_in <= 1.0
        await until(status_is(manager, "a", "unloaded"))
        assert manager.instance("a").metrics.unloads == {"idle": 1}


@within_deadline
async def test_the_idle_timeout_of_a_request_wins_over_the_ttl():
    async with managed(specs("a", ttl=3600)) as (manager, _):
        await answered(manager, "a", idle_timeout=float("inf"))
        assert manager.instance("a").expires_in is None
        await answered(manager, "a")
        assert 3500 < manager.instance("a").expires_in <= 3600
        await answered(manager, "a", idle_timeout=0)
        await until(status_is(manager, "a", "unloaded"))


@within_deadline
async def test_a_model_in_use_does_not_expire():
    async with managed(specs("a", ttl=0)) as (manager, _):
        generation = await manager.instance("a").generate(request())
        assert manager.instance("a").expires_in is None
        generation.close()
        await until(status_is(manager, "a", "unloaded"))


@within_deadline
async def test_an_idle_timeout_of_a_request_ends_with_the_unload():
    async with managed(specs("a", ttl=3600)) as (manager, _):
        await answered(manager, "a", idle_timeout=0)
        await until(status_is(manager, "a", "unloaded"))
        instance = await manager.load(ModelSpec("a", "source-a"))
        assert 3500 < instance.expires_in <= 3600


@within_deadline
async def test_new_settings_apply_to_the_ttl_of_an_idle_model():
    async with managed(specs("a", ttl=3600)) as (manager, _):
        await answered(manager, "a")
        for spec in specs("a", ttl=3600, pin=True), specs("a"):
            await manager.reload(replace(manager.settings, models=spec, ttl=float("inf")))
            assert manager.instance("a").expires_in is None
        await manager.reload(replace(manager.settings, ttl=100.0))
        assert 0 < manager.instance("a").expires_in <= 100
        await manager.reload(replace(manager.settings, ttl=0.0))
        await until(status_is(manager, "a", "unloaded"))
