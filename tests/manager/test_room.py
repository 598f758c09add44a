"""Several models and not enough memory: who is loaded, who leaves, who waits and who is refused."""

import asyncio
from dataclasses import asdict, replace

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import (
    EngineStopped,
    LoadAborted,
    LoadFailed,
    ModelBusy,
    ModelExists,
    ModelNotFound,
    ModelNotLoaded,
    NoRoom,
)
from mlxserver.manager.reload import Reload
from tests.support.managed import ONE, answered, managed, specs, states, status_is
from tests.support.scripted_engine import Death, request, until, within_deadline

# Eviction


@within_deadline
async def test_the_least_recently_used_model_makes_room():
    async with managed(places=2) as (manager, _):
        for key in "abac":
            await answered(manager, key)
        assert states(manager) == "a:loaded c:loaded"
        assert manager.instance("b").metrics.unloads == {"evict": 1}


@within_deadline
async def test_a_pinned_model_stays_and_the_refusal_says_so():
    models = (ModelSpec("a", "x", pin=True), ModelSpec("b", "y"))
    async with managed(models) as (manager, _):
        await answered(manager, "a")
        with pytest.raises(NoRoom, match="Model 'b' needs") as caught:
            await answered(manager, "b")
        assert asdict(caught.value.projection) == {
            "needed": ONE, "free": 0, "evictable": 0, "pinned": ONE, "busy": 0, "budget": ONE,
        }  # fmt: skip
        assert states(manager) == "a:loaded"
        assert manager.instance("b").requests == 0


@within_deadline
async def test_a_load_that_nobody_waits_for_is_refused_at_once_while_others_are_in_use():
    async with managed() as (manager, _):
        generation = await manager.instance("a").generate(request())
        with pytest.raises(NoRoom) as caught:
            await manager.load(ModelSpec("b", "source-b"))
        assert caught.value.projection.busy == ONE
        generation.close()
        await until(lambda: not manager.instance("a").requests)
        await manager.load(ModelSpec("b", "source-b"))
        assert states(manager) == "b:loaded"


@within_deadline
async def test_what_a_model_in_use_has_begun_is_finished_before_it_leaves():
    async with managed(min_residency=0) as (manager, factory):
        await manager.instance("a").load()
        factory.batch.gate.clear()
        running = asyncio.create_task(answered(manager, "a", max_tokens=50))
        await until(lambda: manager.instance("a").requests == 1)
        waiting = asyncio.create_task(answered(manager, "b"))
        await until(status_is(manager, "a", "draining"))
        again = asyncio.create_task(answered(manager, "a"))
        factory.batch.gate.set()
        assert [len(events) for events in await asyncio.gather(running, waiting, again)] == [52, 5, 5]


@within_deadline
async def test_a_model_in_use_keeps_its_place_for_a_time_but_not_for_ever():
    async with managed(min_residency=3600, max_wait=0.2) as (manager, _):
        running = await manager.instance("a").generate(request())
        waiting = asyncio.create_task(answered(manager, "b"))
        await until(lambda: manager.instance("b").requests)
        assert states(manager) == "a:loaded b:loading"
        await until(status_is(manager, "a", "draining"))
        running.close()
        assert len(await waiting) == 5


@within_deadline
async def test_memory_that_an_engine_left_behind_is_granted_to_nobody_until_it_is_free():
    left = 0
    async with managed(places=2, measure_arrays=lambda: left + manager.memory.reserved) as (manager, factory):
        await answered(manager, "a")
        left = ONE
        factory.batch.crash = Death("out of luck")
        with pytest.raises(EngineStopped):
            await answered(manager, "a")
        assert (manager.memory.reserved, manager.memory.unaccounted) == (0, ONE)
        running = await manager.instance("b").generate(request())
        with pytest.raises(NoRoom) as refusal:
            await manager.load(ModelSpec("c", "source-c"))
        assert (refusal.value.projection.budget, refusal.value.projection.busy) == (ONE, ONE)
        running.close()
        left = 0
        await manager.load(ModelSpec("c", "source-c"))
        assert states(manager) == "a:failed b:loaded c:loaded"


@within_deadline
async def test_two_loads_at_once_never_take_the_same_room():
    async with managed(specs("abcdef"), places=2, min_residency=0) as (manager, _):
        most = 0

        async def watch():
            nonlocal most
            while True:
                most = max(most, sum(i._engine is not None for i in manager.instances))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(answered(manager, key) for key in "abcdef" * 3))
        watching.cancel()
        assert most <= 2
        assert manager.memory.reserved <= 2 * ONE


@within_deadline
async def test_who_leaves_while_waiting_for_room_leaves_nothing_behind():
    async with managed() as (manager, _):
        running = await manager.instance("a").generate(request())
        waiting = asyncio.create_task(answered(manager, "b"))
        await until(status_is(manager, "b", "loading"))
        unloading = asyncio.create_task(manager.instance("b").unload("abort"))
        with pytest.raises(LoadAborted):
            await waiting
        await unloading
        assert states(manager) == "a:loaded"
        running.close()


# Time


@within_deadline
async def test_an_idle_model_leaves_when_its_time_is_over():
    async with managed(specs("a", ttl=0.05)) as (manager, _):
        await answered(manager, "a")
        assert manager.instance("a").expires_in <= 0.05
        await until(status_is(manager, "a", "unloaded"))
        assert manager.instance("a").metrics.unloads == {"idle": 1}


@within_deadline
async def test_keep_alive_wins_over_the_models_time():
    async with managed(specs("a", ttl=3600)) as (manager, _):
        await answered(manager, "a", keep_alive=float("inf"))
        assert manager.instance("a").expires_in is None
        await answered(manager, "a")
        assert 3500 < manager.instance("a").expires_in <= 3600
        await answered(manager, "a", keep_alive=0)
        await until(status_is(manager, "a", "unloaded"))


@within_deadline
async def test_a_model_in_use_does_not_expire():
    async with managed(specs("a", ttl=0)) as (manager, _):
        generation = await manager.instance("a").generate(request())
        assert manager.instance("a").expires_in is None
        generation.close()
        await until(status_is(manager, "a", "unloaded"))


# Loads and unloads


@within_deadline
async def test_without_loads_on_demand_the_answer_says_how_to_load():
    async with managed(load_on_demand=False) as (manager, _):
        with pytest.raises(ModelNotLoaded, match="POST /v1/models/load"):
            await answered(manager, "a")
        await manager.load(ModelSpec("a", "source-a"))
        assert len(await answered(manager, "a")) == 5


@within_deadline
async def test_only_registered_models_are_loaded_unless_any_is_allowed():
    async with managed() as (manager, _):
        with pytest.raises(ModelNotFound):
            await answered(manager, "org/name")
        manager.settings = replace(manager.settings, allow_any_model=True)
        assert len(await answered(manager, "org/name")) == 5
        assert manager.instance("org/name").spec.source == "org/name"
        with pytest.raises(ModelNotFound):
            await answered(manager, "/etc")


@within_deadline
async def test_an_alias_is_another_name():
    async with managed((ModelSpec("a", "x", aliases=("gpt-4", "b")),)) as (manager, _):
        assert manager.instance("gpt-4") is manager.instance("b") is manager.instance("a")


@within_deadline
async def test_a_source_is_replaced_side_by_side_where_both_fit():
    async with managed(places=2) as (manager, _):
        await answered(manager, "a")
        old = manager.instance("a")
        running = await old.generate(request())
        with pytest.raises(ModelExists):
            await manager.load(ModelSpec("a", "other"))
        new = await manager.load(ModelSpec("a", "other"), replaces=True)
        assert manager.instance("a") is new
        assert new.status == "loaded"
        await until(lambda: old.status == "draining")
        running.close()
        await until(lambda: old.status == "unloaded")


@pytest.mark.parametrize("places", [1, 2])
@within_deadline
async def test_a_replacement_that_fails_leaves_the_old_model_serving(places):
    async with managed(places=places) as (manager, factory):
        await answered(manager, "a")
        factory.failures.append(LoadFailed("a", "no such file"))
        with pytest.raises(LoadFailed):
            await manager.load(ModelSpec("a", "other"), replaces=True)
        assert manager.instance("a").spec.source == "source-a"
        assert len(await answered(manager, "a")) == 5


@within_deadline
async def test_a_forgotten_model_is_gone_and_a_busy_one_that_may_not_wait_stays():
    async with managed() as (manager, _):
        running = await manager.instance("a").generate(request())
        with pytest.raises(ModelBusy):
            await manager.forget("a", "reject")
        assert "a" in manager.keys
        report = await manager.forget("a", "abort")
        assert (report.aborted, manager.keys) == (1, ["b", "c"])
        running.close()


@within_deadline
async def test_an_abort_cuts_a_drain_short():
    async with managed() as (manager, _):
        await manager.instance("a").generate(request())
        draining = asyncio.create_task(manager.unload("a", "drain"))
        await until(status_is(manager, "a", "draining"))
        reports = [await manager.unload("a", "abort"), await draining]
        assert [report.aborted for report in reports] == [1, 1]


@within_deadline
async def test_closing_calls_a_load_off():
    async with managed() as (manager, factory):
        factory.gate.clear()
        waiting = asyncio.create_task(answered(manager, "a"))
        await until(lambda: factory.builds)
        await manager.close(patience=3600)
        with pytest.raises(LoadAborted):
            await waiting
        with pytest.raises(LoadAborted):
            await answered(manager, "b")


# New settings


@within_deadline
async def test_new_settings_touch_only_the_models_that_changed():
    async with managed(places=3) as (manager, factory):
        for key in "abc":
            await answered(manager, key)
        kept = manager.instance("a")
        a, _, c = manager.settings.models
        models = (replace(a, ttl=5.0), replace(c, source="other"), ModelSpec("d", "source-d"))
        reload = await manager.reload(replace(manager.settings, models=models, port=1))
        assert reload == Reload(added=("d",), removed=("b",), changed=("a", "c"), restart_needed=("port",))
        assert (manager.instance("a"), kept.spec.ttl, kept.status) == (kept, 5.0, "loaded")
        await until(status_is(manager, "c", "loaded"))
        assert manager.instance("c").spec.source == "other"
        assert sorted(manager.keys) == ["a", "c", "d"]
        assert factory.builds == 4


@within_deadline
async def test_models_loaded_at_run_time_survive_new_settings():
    async with managed(places=2) as (manager, _):
        await manager.load(ModelSpec("mine", "source"))
        assert await manager.reload(manager.settings) == Reload()
        assert manager.instance("mine").status == "loaded"
