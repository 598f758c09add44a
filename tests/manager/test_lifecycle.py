"""Loads, unloads and requests at the same time, whose callers leave while models change state."""

import asyncio
import random
import threading
from dataclasses import replace

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import EngineError, LoadAborted, LoadFailed, ModelNotFound, ModelUnloading
from mlxserver.manager import loading
from mlxserver.manager.states import ModelState
from mlxserver.manager.watchdog import check
from mlxserver.server.health import liveness
from tests.support.managed import ESTIMATE, ONE, answered, managed, specs, states
from tests.support.scripted_engine import Death, Panic, ended, read, request, until, within_deadline


async def leave(task):
    """Cancel a caller, not the work that it asked for."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# Callers that leave


@pytest.mark.parametrize("capacity", [1, 2])
@within_deadline
async def test_a_replacement_goes_on_when_its_caller_has_left(capacity):
    async with managed(capacity=capacity) as (manager, factory):
        await answered(manager, "a")
        factory.gate.clear()
        replacing = asyncio.create_task(manager.load(ModelSpec("a", "other"), replaces=True))
        await until(lambda: factory.builds == 2)
        await leave(replacing)
        factory.gate.set()
        await until(lambda: manager.instance("a").spec.source == "other" and states(manager) == "a:loaded")


@within_deadline
async def test_a_new_key_is_forgotten_after_a_failure_although_its_caller_has_left():
    async with managed() as (manager, factory):
        factory.gate.clear()
        factory.failures.append(LoadFailed("new", "no such file"))
        loading = asyncio.create_task(manager.load(ModelSpec("new", "source")))
        await until(lambda: factory.builds)
        await leave(loading)
        factory.gate.set()
        await until(lambda: "new" not in manager.keys)


@within_deadline
async def test_a_replacement_that_failed_and_is_asked_for_again_at_once_does_not_stay_beside_the_old_one():
    async with managed() as (manager, factory):
        old = manager.instance("a")
        running = await old.generate(request())
        replacing = asyncio.create_task(manager.load(ModelSpec("a", "other"), replaces=True))
        await until(lambda: manager.instance("a") is not old)
        new = manager.instance("a")

        async def insist():
            with pytest.raises(LoadFailed):
                await new.load()
            await new.load()

        insisting = asyncio.create_task(insist())
        await until(lambda: new.status == "loading")
        factory.failures.append(LoadFailed("a", "no such file"))
        running.close()
        with pytest.raises(LoadFailed):
            await replacing
        with pytest.raises((LoadAborted, ModelUnloading)):
            await insisting
        await until(lambda: manager.all_instances == manager.instances and states(manager) == "a:loaded")
        assert (manager.instance("a"), new.status) == (old, "unloaded")


@within_deadline
async def test_closing_ends_a_model_that_was_being_forgotten_when_its_caller_left():
    async with managed() as (manager, _):
        instance = manager.instance("a")
        generation = await instance.generate(request())
        forgetting = asyncio.create_task(manager.forget("a"))
        await until(lambda: instance.state is ModelState.DRAINING)
        await leave(forgetting)
        await manager.close(0)
        assert instance.status == "unloaded"
        assert isinstance(await ended(generation), EngineError)


@within_deadline
async def test_a_model_whose_load_was_just_asked_for_is_not_absent():
    async with managed() as (manager, _):
        instance = manager.instance("a")
        loading = asyncio.create_task(instance.load())
        await asyncio.sleep(0)
        assert (instance.state, instance.is_absent) == (ModelState.UNLOADED, False)
        await loading


@within_deadline
async def test_an_error_whose_callers_have_left_is_no_fault_of_the_event_loop():
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    async with managed() as (manager, _):
        running = await manager.instance("a").generate(request())
        await leave(asyncio.create_task(manager.forget("a", "reject")))
        await leave(asyncio.create_task(manager.load(ModelSpec("a", "other"))))
        running.close()
    assert not complaints


# How long an unload may take


@pytest.mark.parametrize("capacity", [1, 2])
@within_deadline
async def test_requests_to_a_model_that_was_replaced_have_a_limited_time(capacity):
    async with managed(capacity=capacity, shutdown_timeout=0.01) as (manager, _):
        running = await manager.instance("a").generate(request())
        await manager.load(ModelSpec("a", "other"), replaces=True)
        assert isinstance(await ended(running), EngineError)
        assert states(manager) == "a:loaded"


@within_deadline
async def test_requests_to_a_model_that_new_settings_lack_have_a_limited_time():
    async with managed(shutdown_timeout=0.01) as (manager, _):
        running = await manager.instance("a").generate(request())
        await manager.reload(replace(manager.settings, models=specs("bc")))
        assert isinstance(await ended(running), EngineError)
        await until(lambda: not manager.memory.reserved)


@within_deadline
async def test_a_drain_aborts_a_load_at_its_deadline():
    async with managed() as (manager, factory):
        factory.gate.clear()
        waiting = asyncio.create_task(answered(manager, "a"))
        await until(lambda: factory.builds)
        report = await manager.unload("a", "drain", 0.01)
        assert (report.aborted, manager.instance("a").status) == (0, "unloaded")
        with pytest.raises(LoadAborted):
            await waiting


@within_deadline
async def test_a_model_that_is_stalled_while_it_is_unloaded_still_shows():
    async with managed(wedged_after=0.01) as (manager, factory):
        instance = manager.instance("a")
        await (await instance.generate(request())).accepted()
        factory.batch.gate.clear()
        await until(lambda: instance.is_stalled)
        forgetting = asyncio.create_task(manager.forget("a", "abort"))
        await until(lambda: check(manager.all_instances, set()) == {instance})
        assert liveness(manager, "1", shows_models=False)["status"] == "degraded"
        factory.batch.gate.set()
        await forgetting


# Metrics of a key


@within_deadline
async def test_the_metrics_of_a_key_last_until_its_last_model_is_unloaded():
    async with managed(specs("a"), capacity=2) as (manager, _):
        running = await manager.instance("a").generate(request())
        await manager.load(ModelSpec("a", "other"), replaces=True)
        assert [dict(metrics.loads) for metrics in manager.metrics] == [{"loaded": 2}]
        forgetting = asyncio.create_task(manager.forget("a"))
        await until(lambda: not manager.keys)
        assert [metrics.key for metrics in manager.metrics] == ["a"]
        running.close()
        await forgetting
        await until(lambda: not manager.metrics)


@within_deadline
async def test_models_that_could_not_be_loaded_for_a_request_leave_no_metrics():
    async with managed((), allow_any_model=True) as (manager, factory):
        for number in range(10):
            factory.failures.append(LoadFailed("?", "no such repository"))
            with pytest.raises(LoadFailed):
                await answered(manager, f"org/{number}")
        assert [metrics.key for metrics in manager.metrics] == ["org/9"]


@within_deadline
async def test_a_request_registers_nothing_where_requests_load_nothing():
    async with managed(allow_any_model=True, load_on_demand=False) as (manager, _):
        with pytest.raises(ModelNotFound):
            await answered(manager, "org/model")
        assert manager.keys == ["a", "b", "c"]


@within_deadline
async def test_a_panic_over_an_estimate_is_a_load_that_failed():
    def panic(spec):
        raise Panic("index out of bounds")

    async with managed(estimate=panic) as (manager, _):
        instance = manager.instance("a")
        with pytest.raises(LoadFailed, match="Panic: index out of bounds"):
            await instance.load()
        assert instance.status == "failed"


@within_deadline
async def test_the_kind_of_a_model_stays_known_after_its_first_load():
    async with managed() as (manager, _):
        instance = manager.instance("a")
        assert instance.kind is None
        await instance.load()
        await instance.unload("abort")
        assert (instance.status, instance.kind) == ("unloaded", "text")


# Wider weights


@pytest.mark.parametrize(("capacity", "is_wide"), [(6, True), (2, False)])
@within_deadline
async def test_weights_are_widened_where_half_of_the_free_memory_stays_free(capacity, is_wide):
    stored = replace(ESTIMATE, widened=2 * ONE)
    async with managed(capacity=capacity, estimate=lambda spec: stored) as (manager, factory):
        instance = manager.instance("a")
        await instance.load()
        assert instance.estimate == (replace(stored, weights=2 * ONE, widened=0) if is_wide else stored)
        (loaded,) = factory.specs
        assert (loaded.weights, loaded.is_widened) == (("bfloat16", True) if is_wide else ("auto", False))
        assert instance.spec.weights == "auto"


@within_deadline
async def test_wide_weights_are_given_back_before_another_model_is_refused():
    def estimate(spec):
        return replace(ESTIMATE, widened=2 * ONE) if spec.key == "a" else replace(ESTIMATE, cache=5 * ONE)

    async with managed(capacity=6, estimate=estimate) as (manager, factory):
        for key in "aba":
            await manager.instance(key).load()
            assert manager.instance(key).status == "loaded"
        loads = [(spec.key, spec.is_widened) for spec in factory.specs]
        assert loads == [("a", True), ("b", False), ("a", False)]


# All at once


class Chaos:
    """Callers that do anything at any moment, and leave at any moment."""

    def __init__(self, manager, factory, seed):
        self.manager, self.factory = manager, factory
        self.random = random.Random(seed)
        self.callers = []
        self.seen = set(manager.instances)

    async def run(self, deeds):
        for _ in range(deeds):
            deed = self.random.choice([self.ask, self.ask, self.load, self.unload, self.forget, self.reload, self.harm])
            self.callers.append(asyncio.create_task(deed(self.random.choice([*self.manager.keys, "x/y"]))))
            if self.random.random() < 0.15:
                self.random.choice(self.callers).cancel()
            if self.random.random() < 0.05:
                self.random.choice([self.factory.gate.set, self.factory.gate.clear])()
            for _ in range(self.random.randrange(4)):
                await asyncio.sleep(0)
            if self.random.random() < 0.05:
                await asyncio.sleep(0.01)
            self.seen.update(self.manager.all_instances)
        self.factory.gate.set()
        await self.manager.close(0.01)
        for error in await asyncio.gather(*self.callers, return_exceptions=True):
            assert error is None or isinstance(error, EngineError | asyncio.CancelledError), repr(error)

    async def ask(self, key):
        generation = await self.manager.resolve(key).generate(request(max_tokens=self.random.choice([1, 20, None])))
        try:
            await generation.accepted()
            async with asyncio.timeout(self.random.random() / 50):
                await read(generation)
        except TimeoutError:
            return
        finally:
            generation.close()

    async def load(self, key):
        source = self.random.choice([f"source-{key}", "other"])
        await self.manager.load(ModelSpec(key, source), replaces=self.random.random() < 0.7)

    async def unload(self, key):
        await self.manager.unload(key, *self.manner())

    async def forget(self, key):
        await self.manager.forget(key, *self.manner())

    def manner(self):
        return self.random.choice(["drain", "abort", "reject"]), self.random.choice([None, 0.01])

    async def reload(self, key):
        models = tuple(
            ModelSpec(key, self.random.choice([f"source-{key}", "new"]), ttl=self.random.choice([None, 0.01]))
            for key in "abcd"
            if self.random.random() < 0.7
        )
        limit = self.random.choice([1, 2, 3]) * ONE
        await self.manager.reload(replace(self.manager.settings, models=models, memory_limit=limit))

    async def harm(self, key):
        fault = self.random.choice([Death("out of luck"), RuntimeError("a bad shape")])
        if self.factory.runners and self.random.random() < 0.5:
            self.random.choice(self.factory.runners).batch.crash = fault
        else:
            self.factory.failures.append(fault)


@pytest.mark.parametrize("seed", range(6))
@within_deadline
async def test_whatever_happens_at_once_nothing_is_left_in_the_end(seed):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    settings = {"min_residency": 0.01, "max_wait": 0.02, "allow_any_model": True, "shutdown_timeout": 0.05}
    async with managed(capacity=2, **settings) as (manager, factory):
        chaos = Chaos(manager, factory, seed)
        await chaos.run(100)
        await until(lambda: all(instance.is_absent and not instance.requests for instance in chaos.seen))
        await until(lambda: manager.all_instances == manager.instances and not manager.memory.reserved)
        await until(lambda: not [each for each in threading.enumerate() if each.name.startswith("engine-")])
    assert not complaints


@within_deadline
async def test_a_load_that_takes_long_logs_its_progress(monkeypatch, caplog):
    monkeypatch.setattr(loading, "QUIET", 0.01)
    caplog.set_level("INFO", "models")

    def logged():
        return [record.fields for record in caplog.records if record.message == "load in progress"]

    async with managed() as (manager, factory):
        factory.gate.clear()
        task = asyncio.create_task(manager.instance("a").load())
        await until(lambda: len(logged()) > 1)
        factory.gate.set()
        await task
        assert (logged()[0]["model"], {"stage", "seconds"} - logged()[0].keys()) == ("a", set())
