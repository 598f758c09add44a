"""Models that come, go and take each other's place while others ask for them."""

import asyncio
from dataclasses import replace

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import (
    LoadAborted,
    LoadFailed,
    ModelExists,
    ModelNotFound,
    ModelReplaced,
    ModelStalled,
    ModelUnloading,
)
from mlxserver.server.handlers import unless_stalled
from tests.support.managed import ONE, answered, managed, specs, states, status_is
from tests.support.scripted_engine import request, until, within_deadline

# One life and the next


@within_deadline
async def test_a_keep_alive_ends_with_the_life_that_it_was_asked_for():
    async with managed(specs("a", ttl=3600)) as (manager, _):
        await answered(manager, "a", keep_alive=0)
        await until(status_is(manager, "a", "unloaded"))
        instance = await manager.load(ModelSpec("a", "source-a"))
        assert 3500 < instance.expires_in <= 3600


@within_deadline
async def test_new_settings_reach_the_time_of_a_model_that_is_idle():
    async with managed(specs("a", ttl=3600)) as (manager, _):
        await answered(manager, "a")
        for spec in specs("a", ttl=3600, pin=True), specs("a"):
            await manager.reload(replace(manager.settings, models=spec, ttl=float("inf")))
            assert manager.instance("a").expires_in is None
        await manager.reload(replace(manager.settings, ttl=100.0))
        assert 0 < manager.instance("a").expires_in <= 100
        await manager.reload(replace(manager.settings, ttl=0.0))
        await until(status_is(manager, "a", "unloaded"))


@within_deadline
async def test_an_engine_that_does_not_end_well_does_not_keep_its_model():
    async with managed(specs("a")) as (manager, _):
        await answered(manager, "a")
        instance = manager.instance("a")
        stop = instance._engine.stop

        async def stop_badly(patience):
            await stop(patience)
            raise ZeroDivisionError

        instance._engine.stop = stop_badly
        instance._services = replace(instance._services, measure_memory=lambda: 1 // 0)
        assert (await instance.unload("drain")).freed_bytes == 0
        assert (instance.status, manager.memory.reserved) == ("unloaded", 0)


@within_deadline
async def test_who_unloads_a_stuck_model_is_told_so_and_the_unload_goes_on():
    async with managed(specs("a"), wedged_after=0.3) as (manager, factory):
        instance = manager.instance("a")
        await (await instance.generate(request())).accepted()
        factory.batch.gate.clear()
        await until(lambda: instance.is_stalled)
        with pytest.raises(ModelStalled, match="'a' is still being unloaded.*has made no step"):
            await unless_stalled(instance, manager.unload("a", "abort"))
        assert instance.status == "draining"
        factory.batch.gate.set()
        await until(lambda: instance.status == "unloaded")


# Registered or not


@within_deadline
async def test_a_model_that_is_no_longer_registered_is_not_loaded_again():
    async with managed(places=2) as (manager, factory):
        forgotten, replaced = manager.instance("a"), manager.instance("b")
        await manager.forget("a")
        await manager.load(ModelSpec("b", "other"), replaces=True)
        for instance in forgotten, replaced:
            with pytest.raises(ModelUnloading):
                await instance.generate(request())
        assert factory.builds == 1


@within_deadline
async def test_who_forgets_a_model_that_is_being_forgotten_is_told_that_it_does_not_exist():
    async with managed() as (manager, _):
        await answered(manager, "a")
        first, second = await asyncio.gather(manager.forget("a"), manager.forget("a"), return_exceptions=True)
        assert (first.aborted, type(second)) == (0, ModelNotFound)
        assert manager.keys == ["b", "c"]


@within_deadline
async def test_asking_for_any_model_registers_only_what_is_to_answer():
    async with managed(allow_any_model=True) as (manager, factory):
        with pytest.raises(ModelNotFound):
            manager.instance("org/first")
        factory.failures.append(LoadFailed("org/first", "no such repository"))
        with pytest.raises(LoadFailed):
            await answered(manager, "org/first")
        assert len(await answered(manager, "org/second")) == 5
        assert manager.keys == ["a", "b", "c", "org/second"]


@within_deadline
async def test_an_alias_of_one_model_is_no_key_for_another():
    async with managed((ModelSpec("a", "x", aliases=("b",)),)) as (manager, _):
        with pytest.raises(ModelExists, match="'b' is already registered with source 'x', not 'y'"):
            await manager.load(ModelSpec("b", "y"))


# Replacing


@within_deadline
async def test_a_key_is_given_to_one_other_source_at_a_time():
    async with managed(places=2) as (manager, factory):
        await answered(manager, "a")
        factory.gate.clear()
        replacing = asyncio.create_task(manager.load(ModelSpec("a", "other"), replaces=True))
        await until(lambda: factory.builds == 2)
        with pytest.raises(ModelReplaced, match="'a' is being replaced already"):
            await manager.load(ModelSpec("a", "third"), replaces=True)
        factory.gate.set()
        assert await replacing is manager.instance("a")


@within_deadline
async def test_closing_calls_a_replacement_off():
    async with managed(places=2) as (manager, factory):
        await answered(manager, "a")
        factory.gate.clear()
        replacing = asyncio.create_task(manager.load(ModelSpec("a", "other"), replaces=True))
        await until(lambda: factory.builds == 2)
        await manager.close(patience=3600)
        with pytest.raises(LoadAborted):
            await replacing


@within_deadline
async def test_room_that_was_granted_and_lost_to_a_lower_limit_is_made_again():
    async with managed(places=2, min_residency=0) as (manager, _):
        running = [await manager.instance(key).generate(request()) for key in "ab"]
        waiting = asyncio.create_task(answered(manager, "c"))
        await until(status_is(manager, "a", "draining"))
        assert states(manager) == "a:draining b:loaded c:loading"
        await manager.reload(replace(manager.settings, memory_limit=ONE))
        running[0].close()
        await until(status_is(manager, "b", "draining"))
        running[1].close()
        assert len(await waiting) == 5
