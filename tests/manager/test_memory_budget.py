"""Several models and not enough memory: loads, evictions, waits and refusals."""

import asyncio
import threading
from dataclasses import asdict, replace

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import (
    EngineStopped,
    LoadAborted,
    NoRoom,
)
from mlxserver.engine.kv_pool import KVPool
from mlxserver.manager.eviction import Rules
from mlxserver.manager.memory_budget import MemoryBudget
from tests.support.managed import ONE, answered, managed, specs, states, status_is
from tests.support.prefixes import Entries
from tests.support.scripted_engine import Death, request, until, within_deadline


@within_deadline
async def test_the_least_recently_used_model_is_evicted():
    async with managed(capacity=2) as (manager, _):
        for key in "abac":
            await answered(manager, key)
        assert states(manager) == "a:loaded c:loaded"
        assert manager.instance("b").metrics.unloads == {"evict": 1}


@within_deadline
async def test_a_load_of_a_loaded_model_is_a_use():
    async with managed(capacity=2) as (manager, _):
        for key in "ab":
            await answered(manager, key)
        await manager.instance("a").load()
        await answered(manager, "c")
        assert states(manager) == "a:loaded c:loaded"


@within_deadline
async def test_a_pinned_model_stays_and_counts_as_pinned_in_the_refusal():
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
async def test_a_load_without_a_request_is_refused_at_once_while_the_others_are_in_use():
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
async def test_an_evicted_model_finishes_its_running_requests():
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
async def test_a_model_in_use_stays_for_min_residency_but_no_longer_than_max_wait():
    async with managed(min_residency=3600, max_wait=1.0) as (manager, _):
        running = await manager.instance("a").generate(request())
        waiting = asyncio.create_task(answered(manager, "b"))
        await until(lambda: manager.instance("b").requests)
        assert states(manager) == "a:loaded b:loading"
        await until(status_is(manager, "a", "draining"))
        running.close()
        assert len(await waiting) == 5


@within_deadline
async def test_memory_that_an_engine_left_behind_is_not_granted_until_it_is_free():
    left = 0
    async with managed(capacity=2, measure_arrays=lambda: left + manager.memory.reserved) as (manager, factory):
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
async def test_two_loads_at_once_never_take_the_same_memory():
    async with managed(specs("abcdef"), capacity=2, min_residency=0) as (manager, _):
        most = 0

        async def watch():
            nonlocal most
            while True:
                most = max(most, sum(i.facts is not None for i in manager.instances))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(answered(manager, key) for key in "abcdef" * 3))
        watching.cancel()
        assert most <= 2
        assert manager.memory.reserved <= 2 * ONE


@within_deadline
async def test_a_load_aborted_while_it_waits_for_memory_leaves_nothing_behind():
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


@within_deadline
async def test_memory_that_was_granted_and_lost_to_a_lower_limit_is_granted_anew():
    async with managed(capacity=2, min_residency=0) as (manager, _):
        running = [await manager.instance(key).generate(request()) for key in "ab"]
        waiting = asyncio.create_task(answered(manager, "c"))
        await until(status_is(manager, "a", "draining"))
        assert states(manager) == "a:draining b:loaded c:loading"
        await manager.reload(replace(manager.settings, memory_limit=ONE))
        running[0].close()
        await until(status_is(manager, "b", "draining"))
        running[1].close()
        assert len(await waiting) == 5


@within_deadline
async def test_closing_refuses_a_load_whose_victims_have_not_left_yet():
    async with managed(min_residency=0) as (manager, _):
        running = await manager.instance("a").generate(request())
        waiting = asyncio.create_task(answered(manager, "b"))
        await until(status_is(manager, "a", "draining"))
        manager.memory.close()
        with pytest.raises(LoadAborted):
            await waiting
        assert states(manager) == "a:draining"
        running.close()


def test_what_is_in_use_is_read_at_one_moment():
    """An engine thread turns KV cache into a prefix and back: there is never more than the one or the other."""
    prefixes = Entries()
    pool = KVPool(prefixes)
    pool.publish(limit=100, fixed=0, reserved={})
    account = pool.open("a", floor=0)
    budget = MemoryBudget(lambda: Rules(100, 0.0, 0.0), pool=pool)
    seen = []

    def turn():
        for _ in range(20_000):
            assert account.start(100, 1, 0.0, 0.0)
            with pool.lock:
                account.give_back(0, 0, 0.0)
                prefixes.total_bytes = 100

    thread = threading.Thread(target=turn)
    thread.start()
    while thread.is_alive():
        use = budget.use
        seen.append(use.held + use.prefixes)
    assert max(seen) <= 100
