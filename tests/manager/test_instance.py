"""States, loads, unloads and requests of one model, with scripted engines."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.errors import (
    EngineStopped,
    LoadAborted,
    LoadFailed,
    ModelBusy,
    ModelExists,
    ModelNotFound,
    ModelUnloading,
    PromptRejected,
    QueueFull,
    RequestFailed,
)
from mlxserver.engine.loading.estimate import Estimate
from mlxserver.manager.states import TRANSITIONS, ModelState
from model_manager import ModelManager
from tests.support.scripted_engine import Death, Factory, ended, read, request, until, within_deadline


@asynccontextmanager
async def managed(*specs, **fields):
    """A manager of scripted models, by default one of key "m", and the factory of their engines."""
    factory = Factory()
    memory = iter(range(10**6, 0, -100))
    settings = replace(Settings(memory_limit=10**6), models=specs or (ModelSpec("m", "source", **fields),))
    manager = ModelManager(settings, factory.start, lambda: next(memory), lambda spec: Estimate(100, 100, 100))
    try:
        yield manager, factory
    finally:
        factory.gate.set()
        for runner in factory.runners:
            runner.batch.gate.set()
        await manager.close(0)


async def answered(instance, text="hello", max_tokens=3):
    generation = await instance.generate(request(text, max_tokens))
    await generation.accepted()
    return await read(generation)


async def started(coroutine):
    """A task that has come to its first wait."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


# States


@within_deadline
async def test_a_model_goes_through_its_states_and_back():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        assert repr(instance) == "<ModelInstance m UNLOADED requests=0>"
        assert (instance.status, instance.facts) == ("unloaded", None)
        factory.gate.clear()
        loading = await started(instance.load())
        assert repr(instance) == "<ModelInstance m LOADING requests=0>"
        factory.gate.set()
        await loading
        assert repr(instance) == "<ModelInstance m READY requests=0>"
        assert (instance.status, instance.facts) == ("loaded", factory.runners[0].facts)
        generation = await instance.generate(request())
        unloading = await started(instance.unload("drain"))
        assert repr(instance) == "<ModelInstance m DRAINING requests=1>"
        generation.close()
        await unloading
        assert repr(instance) == "<ModelInstance m UNLOADED requests=0>"
        assert (instance.status, instance.facts) == ("unloaded", None)
        await answered(instance)
        assert (factory.builds, instance.status) == (2, "loaded")


def test_every_state_can_be_left_and_reached():
    assert TRANSITIONS.keys() == set(ModelState)
    assert set().union(*TRANSITIONS.values()) == set(ModelState)
    assert {state.value for state in ModelState} == {"unloaded", "loading", "loaded", "evicting", "draining", "failed"}


@within_deadline
async def test_a_transition_that_is_not_in_the_table_is_a_bug():
    async with managed() as (manager, _):
        with pytest.raises(AssertionError, match="m: UNLOADED can't become EVICTING"):
            manager.instance("m").evict()


# Loading


@within_deadline
async def test_concurrent_requests_share_one_load_and_wait_for_it():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.gate.clear()
        asking = [await started(answered(instance)) for _ in range(5)]
        loading = await started(instance.load())
        assert repr(instance) == "<ModelInstance m LOADING requests=5>"
        factory.gate.set()
        assert [len(events) for events in await asyncio.gather(*asking)] == [5] * 5
        await loading
        assert (factory.builds, instance.requests) == (1, 0)


@within_deadline
async def test_a_loaded_model_is_not_loaded_again():
    async with managed() as (manager, factory):
        for _ in range(3):
            await manager.instance("m").load()
        assert factory.builds == 1


@within_deadline
async def test_a_caller_that_leaves_does_not_cancel_the_load_of_the_others():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.gate.clear()
        leaving, staying = await started(answered(instance)), await started(answered(instance))
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert repr(instance) == "<ModelInstance m LOADING requests=1>"
        factory.gate.set()
        assert len(await staying) == 5
        assert factory.builds == 1


@within_deadline
async def test_a_load_goes_on_when_all_callers_have_left():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.gate.clear()
        leaving = await started(instance.load())
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        factory.gate.set()
        await until(lambda: instance.status == "loaded")


@within_deadline
async def test_a_failed_load_fails_every_request_that_waited_and_the_next_one_tries_again():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.gate.clear()
        factory.failures.append(LoadFailed("m", "disk on fire"))
        asking = [await started(answered(instance)) for _ in range(3)]
        factory.gate.set()
        errors = await asyncio.gather(*asking, return_exceptions=True)
        assert [str(error) for error in errors] == ["Model 'm' could not be loaded: disk on fire"] * 3
        assert repr(instance) == "<ModelInstance m FAILED requests=0>"
        assert (instance.status, instance.failure_reason) == ("failed", "Model 'm' could not be loaded: disk on fire")
        assert len(await answered(instance)) == 5
        assert (instance.status, instance.failure_reason, factory.builds) == ("loaded", None, 2)


@within_deadline
async def test_an_engine_that_can_not_even_be_started_is_a_failed_model_too():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.start_failures.append(RuntimeError("can't start new thread"))
        with pytest.raises(LoadFailed, match="RuntimeError: can't start new thread"):
            await answered(instance)
        assert repr(instance) == "<ModelInstance m FAILED requests=0>"
        assert len(await answered(instance)) == 5


@within_deadline
async def test_preload_loads_what_is_to_be_there_and_one_failure_stops_no_other():
    specs = [ModelSpec("a", "source", preload=True), ModelSpec("b", "source"), ModelSpec("c", "source", preload=True)]
    async with managed(*specs) as (manager, factory):
        factory.failures.append(LoadFailed("?", "no"))
        await manager.preload()
        assert sorted(instance.status for instance in manager.instances) == ["failed", "loaded", "unloaded"]
        assert manager.instance("b").status == "unloaded"


# Counting


@pytest.mark.parametrize(
    ("text", "max_tokens", "error"),
    [("hello", 3, None), ("refuse", 3, PromptRejected), ("break", 3, RequestFailed), ("hello", None, EngineStopped)],
)
@within_deadline
async def test_the_count_of_requests_returns_to_zero_in_every_ending(text, max_tokens, error):
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        generation = await instance.generate(request(text, max_tokens))
        assert instance.requests == 1
        if error is EngineStopped:
            factory.batch.crash = Death("out of luck")
        if error:
            with pytest.raises(error):
                await generation.accepted()
                await read(generation)
        await until(lambda: instance.requests == 0)


@within_deadline
async def test_a_closed_generation_no_longer_counts():
    async with managed() as (manager, _):
        instance = manager.instance("m")
        generation = await instance.generate(request())
        generation.close()
        await until(lambda: instance.requests == 0)
        generation.close()
        await answered(instance)
        assert instance.requests == 0


@within_deadline
async def test_a_request_counts_until_the_engine_is_done_not_until_it_is_read():
    async with managed() as (manager, _):
        instance = manager.instance("m")
        generation = await instance.generate(request(max_tokens=5))
        await until(lambda: instance.requests == 0)
        await generation.accepted()
        assert len(await read(generation)) == 7


@within_deadline
async def test_a_request_cancelled_while_the_model_loads_no_longer_counts():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.gate.clear()
        asking = await started(answered(instance))
        assert instance.requests == 1
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert instance.requests == 0


@within_deadline
async def test_more_requests_than_may_run_and_wait_are_refused():
    async with managed(max_running=2, max_waiting=1) as (manager, factory):
        instance = manager.instance("m")
        await instance.load()
        factory.batch.slots = 2
        held = [await instance.generate(request()) for _ in range(3)]
        await until(lambda: (instance.running, instance.waiting) == (2, 1))
        with pytest.raises(QueueFull, match="'m' has 1 requests waiting") as caught:
            await instance.generate(request())
        assert caught.value.retry_after > 0
        assert instance.requests == 3
        assert instance.metrics.requests == {("QueueFull", ""): 1}
        held.pop().close()
        await until(lambda: instance.requests == 2)
        held.append(await instance.generate(request()))


@within_deadline
async def test_a_request_runs_while_it_holds_a_slot_however_many_choices_it_has():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        await instance.load()
        factory.batch.slots = 4
        held = [await instance.generate(replace(request(), n=3)) for _ in range(3)]
        await until(lambda: (instance.running, instance.waiting) == (2, 1))
        for generation in held:
            generation.close()
        await until(lambda: (instance.running, instance.waiting) == (0, 0))


@within_deadline
async def test_a_request_that_waits_for_the_model_does_not_run():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.gate.clear()
        asking = await started(answered(instance))
        assert (instance.running, instance.waiting) == (0, 1)
        factory.gate.set()
        await asking


@within_deadline
async def test_only_complete_answers_are_measured_for_the_time_until_a_retry():
    async with managed() as (manager, _):
        instance = manager.instance("m")
        (await instance.generate(request())).close()
        await until(lambda: instance.requests == 0)
        assert isinstance(await ended(await instance.generate(request("garble"))), RequestFailed)
        assert instance.pace == 0
        await answered(instance)
        assert instance.pace > 0


@within_deadline
async def test_requests_that_wait_for_the_load_are_bounded_too():
    async with managed(max_running=1, max_waiting=1) as (manager, factory):
        instance = manager.instance("m")
        factory.gate.clear()
        asking = [await started(answered(instance)) for _ in range(2)]
        with pytest.raises(QueueFull):
            await instance.generate(request())
        factory.gate.set()
        await asyncio.gather(*asking)


# Unloading


@within_deadline
async def test_a_drain_lets_running_requests_finish_and_takes_no_new_ones():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        await instance.load()
        factory.batch.gate.clear()
        asking = await started(answered(instance))
        unloading = await started(instance.unload("drain"))
        for ask in (instance.generate(request()), instance.load()):
            with pytest.raises(ModelUnloading, match="'m' is being unloaded"):
                await ask
        factory.batch.gate.set()
        assert len(await asking) == 5
        report = await unloading
        assert (report.completed, report.aborted, report.freed_bytes) == (1, 0, 100)


@within_deadline
async def test_a_drain_ends_at_its_deadline():
    async with managed() as (manager, _):
        instance = manager.instance("m")
        generation = await instance.generate(request())
        report = await instance.unload("drain", patience=0.01)
        assert (report.completed, report.aborted) == (0, 1)
        await generation.accepted()
        with pytest.raises(EngineStopped):
            await read(generation)
        assert repr(instance) == "<ModelInstance m UNLOADED requests=0>"


@within_deadline
async def test_an_abort_ends_running_requests_now():
    async with managed() as (manager, _):
        instance = manager.instance("m")
        generations = [await instance.generate(request()) for _ in range(3)]
        report = await instance.unload("abort")
        assert (report.completed, report.aborted) == (0, 3)
        for generation in generations:
            with pytest.raises(EngineStopped):
                await generation.accepted()
                await read(generation)
        assert (instance.requests, instance.status) == (0, "unloaded")


@within_deadline
async def test_reject_unloads_only_a_model_without_requests():
    async with managed() as (manager, _):
        instance = manager.instance("m")
        generation = await instance.generate(request())
        with pytest.raises(ModelBusy, match="'m' has 1 requests in progress"):
            await instance.unload("reject")
        assert instance.status == "loaded"
        generation.close()
        await until(lambda: instance.requests == 0)
        await instance.unload("reject")
        assert instance.status == "unloaded"


@within_deadline
async def test_unloading_what_is_not_loaded_changes_nothing():
    async with managed() as (manager, factory):
        report = await manager.instance("m").unload("drain")
        assert (report.completed, report.aborted, report.freed_bytes) == (0, 0, 0)
        assert factory.builds == 0


@within_deadline
async def test_an_unload_goes_on_when_its_caller_has_left():
    async with managed() as (manager, _):
        instance = manager.instance("m")
        generation = await instance.generate(request())
        unloading = await started(instance.unload("drain"))
        unloading.cancel()
        await asyncio.gather(unloading, return_exceptions=True)
        assert instance.status == "draining"
        generation.close()
        await until(lambda: instance.status == "unloaded")


@within_deadline
async def test_an_unload_during_a_load_comes_after_it():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.gate.clear()
        asking = await started(answered(instance))
        unloading = await started(instance.unload("drain"))
        assert instance.status == "loading"
        factory.gate.set()
        assert len(await asking) == 5
        assert (await unloading).completed == 1
        assert instance.status == "unloaded"


@within_deadline
async def test_an_abort_during_a_load_fails_the_requests_that_wait_for_it():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.gate.clear()
        asking = await started(answered(instance, max_tokens=None))
        unloading = await started(instance.unload("abort"))
        factory.gate.set()
        with pytest.raises(LoadAborted, match="Loading model 'm' was called off"):
            await asking
        await unloading
        assert repr(instance) == "<ModelInstance m UNLOADED requests=0>"


@within_deadline
async def test_two_unloads_at_once_are_one():
    async with managed() as (manager, _factory):
        instance = manager.instance("m")
        await answered(instance)
        reports = await asyncio.gather(instance.unload("drain"), instance.unload("abort"))
        assert reports[0] is reports[1]
        assert reports[0].freed_bytes == 100
        assert instance.status == "unloaded"


# Death


@within_deadline
async def test_a_dead_engine_is_a_failed_model_which_the_next_request_loads_again():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        generation = await instance.generate(request())
        factory.batch.crash = Death("out of luck")
        with pytest.raises(EngineStopped, match="out of luck"):
            await generation.accepted()
            await read(generation)
        assert repr(instance) == "<ModelInstance m FAILED requests=0>"
        assert (instance.status, instance.failure_reason) == (
            "failed",
            "The engine of model 'm' stopped: Death: out of luck",
        )
        assert len(await answered(instance)) == 5
        assert (instance.status, instance.failure_reason) == ("loaded", None)


@within_deadline
async def test_an_engine_that_dies_while_it_drains_ends_the_drain():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        await instance.generate(request())
        unloading = await started(instance.unload("drain"))
        factory.batch.crash = Death("out of luck")
        await unloading
        assert repr(instance) == "<ModelInstance m UNLOADED requests=0>"
        assert len(await answered(instance)) == 5


# Registry


@within_deadline
async def test_an_unknown_key_is_answered_with_the_known_ones():
    async with managed(ModelSpec("a", "x"), ModelSpec("b", "y")) as (manager, _):
        assert manager.keys == ["a", "b"]
        with pytest.raises(ModelNotFound, match=r"Model 'c' does not exist. Known models: a, b\."):
            manager.instance("c")


@within_deadline
async def test_a_model_can_be_registered_and_loaded_at_run_time():
    async with managed() as (manager, _):
        instance = await manager.load(ModelSpec("new", "elsewhere"))
        assert (manager.instance("new"), instance.status) == (instance, "loaded")
        assert await manager.load(ModelSpec("new", "elsewhere")) is instance


@within_deadline
async def test_a_key_can_not_be_taken_by_another_source():
    async with managed() as (manager, factory):
        with pytest.raises(ModelExists, match="'m' is already registered with source 'source', not 'elsewhere'"):
            await manager.load(ModelSpec("m", "elsewhere"))
        assert factory.builds == 0


@within_deadline
async def test_a_new_key_whose_load_fails_is_forgotten():
    async with managed() as (manager, factory):
        factory.failures.append(LoadFailed("new", "no such file"))
        with pytest.raises(LoadFailed):
            await manager.load(ModelSpec("new", "elsewhere"))
        assert manager.keys == ["m"]
        factory.failures.append(LoadFailed("m", "no such file"))
        with pytest.raises(LoadFailed):
            await manager.load(ModelSpec("m", "source"))
        assert manager.keys == ["m"]


@within_deadline
async def test_two_models_are_independent():
    async with managed(ModelSpec("a", "x"), ModelSpec("b", "y")) as (manager, factory):
        a, b = manager.instance("a"), manager.instance("b")
        await a.load()
        first = factory.batch
        generation = await a.generate(request())
        factory.gate.clear()
        loading = await started(b.load())
        assert len(await answered(a)) == 5
        factory.gate.set()
        await loading
        factory.batch.gate.clear()
        waiting = await started(answered(b))
        assert len(await answered(a)) == 5
        factory.batch.gate.set()
        await waiting
        first.crash = Death("out of luck")
        with pytest.raises(EngineStopped):
            await generation.accepted()
            await read(generation)
        assert len(await answered(b)) == 5


@within_deadline
async def test_closing_ends_every_model():
    async with managed(ModelSpec("a", "x"), ModelSpec("b", "y")) as (manager, factory):
        await manager.instance("a").generate(request())
        await answered(manager.instance("b"))
        await manager.close(patience=0.01)
        assert [instance.status for instance in manager.instances] == ["unloaded", "unloaded"]
        assert all(runner.batch.is_closed for runner in factory.runners)
