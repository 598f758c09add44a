"""Faults at the Batch seam: which requests they end, with which error, and that all others go on."""

import asyncio
import math
import re
import threading
from contextlib import asynccontextmanager

import pytest

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.errors import (
    EngineError,
    EngineStopped,
    EngineUnloaded,
    LoadFailed,
    ModelFailed,
    OutOfMemory,
    RequestFailed,
    StepFailed,
)
from mlxserver.engine.loading.estimate import Estimate
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import Detokenize
from mlxserver.engine.worker.engine import Engine
from mlxserver.engine.worker.faults import is_out_of_memory
from mlxserver.engine.worker.mailbox import Mailbox, Stop
from mlxserver.engine.worker.thread_pool import ThreadPool
from mlxserver.manager import timers
from mlxserver.manager.timers import LONGEST_BACKOFF, Backoff
from mlxserver.manager.watchdog import check
from mlxserver.server.health import liveness, readiness
from model_manager import ModelManager
from tests.support.scripted_engine import DEADLINE, Death, Factory, Panic, ended, read, request, until, within_deadline

OUT_OF_MEMORY = "[malloc] Unable to allocate 68719476736 bytes."


@asynccontextmanager
async def running_engine(**options):
    """A scripted engine, its batch, and what it counts."""
    factory, metrics = Factory(), ModelMetrics("m")
    engine = Engine("m", factory.build, metrics=metrics, **options)
    await engine.started()
    try:
        yield engine, factory.batch, metrics
    finally:
        factory.batch.gate.set()
        await engine.stop()


@asynccontextmanager
async def managed(*specs, **settings):
    """A manager of scripted models, by default of one, "m", and the factory of their engines."""
    factory = Factory()
    settings = Settings(memory_limit=10**6, models=specs or (ModelSpec("m", "source"),), **settings)
    manager = ModelManager(settings, factory.start, lambda: 0, lambda spec: Estimate(100, 100, 100))
    try:
        yield manager, factory
    finally:
        for runner in factory.runners:
            runner.batch.gate.set()
        await manager.close(0)


async def answered(instance, max_tokens=3):
    try:
        generation = await instance.generate(request("hello", max_tokens))
    except Exception as error:
        return error
    return await ended(generation)


async def failing_step(batch, *generations, fault):
    """Let the next step fail, with all these at work."""
    for generation in generations:
        await generation.accepted()
    batch.faults.append(fault)


# One request's fault


@pytest.mark.parametrize(
    ("text", "cause"),
    [("garble", "no such token"), ("bind", "a knot in the grammar"), ("break", "an unplanned fault")],
)
@pytest.mark.parametrize(("mark", "kind"), [("", "ZeroDivisionError"), ("!", "Panic")])
@within_deadline
async def test_a_fault_of_one_request_ends_that_one_alone(text, cause, mark, kind):
    async with running_engine() as (engine, batch, _):
        others = [engine.submit(request(max_tokens=30)) for _ in range(2)]
        failed = engine.submit(request(text + mark, max_tokens=30))
        error = await ended(failed)
        assert isinstance(error, RequestFailed)
        assert f"'m' could not process this request: {kind}: {cause}" in str(error)
        assert [await ended(other) for other in others] == [32, 32]
        await until(lambda: not batch.sequences)
        assert batch.restarts == 0


@within_deadline
async def test_a_fault_of_one_of_several_choices_ends_the_whole_request():
    async with running_engine() as (engine, batch, metrics):
        garbled = request("garble", max_tokens=30)
        failed = engine.submit(type(garbled)(garbled.prompt, max_tokens=30, n=3))
        assert isinstance(await ended(failed), RequestFailed)
        await until(lambda: not batch.sequences)
        assert metrics.faults == {"request": 1}


@within_deadline
async def test_a_panic_over_a_question_or_a_prompt_fails_that_request():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        await instance.load()
        factory.runners[0].panic = Panic("index out of bounds")
        with pytest.raises(RequestFailed, match="Panic: index out of bounds"):
            await instance.ask(Detokenize((1,)))
        with pytest.raises(RequestFailed, match="Panic: index out of bounds"):
            await instance.generate(request())
        assert isinstance(await answered(instance), RequestFailed)
        factory.runners[0].panic = None
        assert await answered(instance) == 5
        assert factory.builds == 1


# A step's fault


@within_deadline
async def test_a_step_that_fails_ends_the_running_requests_alone():
    async with running_engine() as (engine, batch, metrics):
        batch.slots = 2
        at_work = [engine.submit(request(max_tokens=10**6)) for _ in range(2)]
        waiting = [engine.submit(request(max_tokens=5)) for _ in range(3)]
        await failing_step(batch, *at_work, fault=ValueError("a bad shape"))
        for generation in at_work:
            with pytest.raises(StepFailed, match="'m' failed while it generated this answer: ValueError: a bad shape"):
                await read(generation)
        assert [await ended(generation) for generation in waiting] == [7, 7, 7]
        assert await ended(engine.submit(request(max_tokens=5))) == 7
        assert metrics.faults == {"step": 1}


@within_deadline
async def test_nothing_follows_the_error_of_a_failed_step():
    async with running_engine() as (engine, batch, _):
        calls = []
        generation = engine.submit(request())
        generation.on_done = lambda: calls.append(1)
        await failing_step(batch, generation, fault=ValueError("a bad shape"))
        with pytest.raises(StepFailed):
            while True:
                await generation.events()
        generation.close()
        await ended(engine.submit(request(max_tokens=2)))
        assert calls == [1]


@within_deadline
async def test_a_good_step_resets_the_count_of_failed_ones():
    async with running_engine() as (engine, batch, metrics):
        for _ in range(5):
            await failing_step(batch, fault=ValueError("a bad shape"))
            assert isinstance(await ended(engine.submit(request())), StepFailed)
            assert await ended(engine.submit(request(max_tokens=2))) == 4
        assert metrics.faults == {"step": 5}


@within_deadline
async def test_three_failed_steps_in_a_row_end_the_engine_and_the_next_request_loads_the_model_anew():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        await instance.load()
        factory.batch.crash = ValueError("a broken weight")
        errors = [await answered(instance) for _ in range(3)]
        assert [type(error) for error in errors] == [StepFailed] * 3
        await until(lambda: instance.status == "failed")
        assert repr(instance) == "<ModelInstance m FAILED requests=0>"
        assert "3 steps in a row failed, the last with ValueError: a broken weight" in instance.failure_reason
        assert (manager.memory.reserved, instance.facts) == (0, None)
        assert await answered(instance) == 5
        assert (factory.builds, instance.status, instance.failure_reason) == (2, "loaded", None)


@within_deadline
async def test_requests_that_wait_when_the_engine_ends_fail():
    async with running_engine() as (engine, batch, _):
        batch.slots = 1
        batch.crash = ValueError("a broken weight")
        batch.gate.clear()
        generations = [engine.submit(request()) for _ in range(5)]
        await generations[-1].accepted()
        batch.gate.set()
        errors = [await ended(generation) for generation in generations[:-1]]
        assert [type(error) for error in errors] == [StepFailed] * 3 + [EngineStopped]
        with pytest.raises(EngineStopped):
            await read(generations[-1])


@within_deadline
async def test_a_batch_that_can_not_restart_ends_the_engine_and_every_request():
    async with running_engine() as (engine, batch, _):
        batch.slots = 1
        batch.restart = lambda staying: 1 / 0
        generations = [engine.submit(request()) for _ in range(2)]
        await failing_step(batch, *generations, fault=ValueError("a bad shape"))
        for generation in generations:
            with pytest.raises(EngineStopped, match="division by zero"):
                await read(generation)


@within_deadline
async def test_requests_of_a_failed_step_fail_even_if_the_fresh_batch_fails_at_once():
    async with running_engine() as (engine, batch, _):
        batch.slots = 1
        at_work, waiting = [engine.submit(request()) for _ in range(2)]
        batch.remove = lambda rows: 1 / 0
        await failing_step(batch, at_work, waiting, fault=ValueError("a bad shape"))
        with pytest.raises(StepFailed, match="a bad shape"):
            await read(at_work)
        with pytest.raises(EngineStopped, match="division by zero"):
            await read(waiting)


async def leave(generation):
    await generation.accepted()
    generation.close()
    await until(lambda: generation.is_done)


async def be_refused(generation):
    with pytest.raises(RequestFailed, match="no such row"):
        await generation.accepted()


@pytest.mark.parametrize("how", [leave, be_refused])
@within_deadline
async def test_a_cancelled_or_refused_request_ends_even_if_the_engine_ends_over_it(how):
    def lose(rows):
        raise EngineError("A rank is gone.")

    def refuse(rows):
        raise ValueError("no such row")

    async with running_engine() as (engine, batch, _):
        batch.remove = lose
        if how is be_refused:
            batch.insert = refuse
        await how(engine.submit(request()))
        await until(lambda: engine._ended.is_set())


# Out of memory


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(OUT_OF_MEMORY),
        RuntimeError("[malloc_or_wait] Unable to allocate 17179869184 bytes."),
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed 8."),
        RuntimeError(
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
        ),
        RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
        RuntimeError("cublasLtCreate(&handle_) failed: CUBLAS_STATUS_ALLOC_FAILED"),
        MemoryError("std::bad_alloc"),
    ],
)
def test_out_of_memory_is_recognized_on_every_backend(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("[matmul] shapes differ"), ValueError("out of memory"), OSError("x")])
def test_other_faults_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


@within_deadline
async def test_memory_that_runs_out_once_ends_no_request():
    freed = []
    async with running_engine(free=lambda: freed.append(1)) as (engine, batch, metrics):
        batch.gate.clear()
        generations = [engine.submit(request(max_tokens=20)) for _ in range(3)]
        batch.faults.append(RuntimeError(OUT_OF_MEMORY))
        batch.gate.set()
        assert [await ended(generation) for generation in generations] == [22, 22, 22]
        assert (batch.restarts, freed, metrics.faults) == (1, [1], {"out_of_memory": 1})


@within_deadline
async def test_memory_that_runs_out_again_ends_the_youngest_running_request():
    async with running_engine() as (engine, batch, _):
        batch.slots = 2
        batch.gate.clear()
        generations = [engine.submit(request(max_tokens=20)) for _ in range(3)]
        await generations[-1].accepted()
        batch.faults += [RuntimeError(OUT_OF_MEMORY), RuntimeError(OUT_OF_MEMORY)]
        batch.gate.set()
        with pytest.raises(OutOfMemory, match="Memory ran out while model 'm' worked on this request"):
            await generations[1].accepted()
            await read(generations[1])
        assert await ended(generations[0]) == 22
        assert len(await read(generations[2])) == 22


@within_deadline
async def test_memory_that_never_suffices_ends_one_request_after_the_other_but_not_the_engine():
    async with running_engine() as (engine, batch, _):
        batch.faults += [RuntimeError(OUT_OF_MEMORY)] * 8
        assert [type(await ended(engine.submit(request(max_tokens=3)))) for _ in range(4)] == [OutOfMemory] * 4
        assert await ended(engine.submit(request(max_tokens=3))) == 5


# A thread that is dead or stalled


@within_deadline
async def test_a_dead_thread_ends_every_request_and_is_replaced():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        generation = await instance.generate(request())
        factory.batch.crash = Death("out of luck")
        assert isinstance(await ended(generation), EngineStopped)
        assert (instance.status, instance.requests) == ("failed", 0)
        assert await answered(instance) == 5


@within_deadline
async def test_a_stalled_engine_shows_until_it_goes_on(caplog):
    async with managed(wedged_after=0.05) as (manager, factory):
        instance = manager.instance("m")
        generation = await instance.generate(request(max_tokens=5))
        factory.batch.gate.clear()
        generation = await instance.generate(request(max_tokens=5))
        await until(lambda: instance.is_stalled)
        assert re.fullmatch(r"The engine of model 'm' has made no step for \d+ s\..*", instance.failure_reason)
        assert instance.status == "loaded"
        assert liveness(manager, "1", shows_models=True)["models"]["m"]["wedged"]
        assert (liveness(manager, "1", shows_models=False), readiness(manager, "m")[0]) == ({"status": "degraded"}, 503)
        stalled = check(manager.instances, set())
        assert stalled == {instance}
        assert check(manager.instances, stalled) == stalled
        factory.batch.gate.set()
        assert await ended(generation) == 7
        await until(lambda: not instance.is_stalled)
        assert (liveness(manager, "1", shows_models=False), readiness(manager, "m")[0]) == ({"status": "ok"}, 200)
        assert check(manager.instances, stalled) == set()
        assert [record.message for record in caplog.records] == ["stalled", "no longer stalled"]


@within_deadline
async def test_an_engine_without_work_is_not_stalled():
    async with running_engine() as (engine, _, _):
        await ended(engine.submit(request(max_tokens=2)))
        await until(lambda: engine.stalled_for == 0)
        await asyncio.sleep(0.01)
        assert engine.stalled_for == 0


def test_the_first_message_after_a_wait_is_work_too():
    mailbox = Mailbox()
    mailbox.put(Stop())
    taken = mailbox.take(wait=True)
    assert mailbox._taken is None
    next(taken)
    assert mailbox._taken is not None


@within_deadline
async def test_generations_of_a_stalled_engine_fail_when_it_is_to_stop():
    async with running_engine() as (engine, batch, _):
        batch.gate.clear()
        at_work = engine.submit(request())
        await at_work.accepted()
        await until(lambda: engine.stalled_for > 0)
        unseen = engine.submit(request())
        assert await engine.ask(Detokenize((1,))) == "answer"  # that needs no step
        stopping = asyncio.create_task(engine.stop(patience=0.01))
        for generation in (at_work, unseen):
            with pytest.raises(EngineStopped, match="it has made no step for"):
                await read(generation)
        assert isinstance(await ended(engine.submit(request())), EngineStopped)
        assert not stopping.done()
        batch.gate.set()
        await stopping
        for asking in (engine.ask(Detokenize((1,))), engine.preprocess(request())):
            with pytest.raises(EngineUnloaded):
                await asking


@within_deadline
async def test_a_request_whose_insertion_stalls_the_engine_fails_too():
    async with running_engine() as (engine, batch, _):
        at_it, go_on = threading.Event(), threading.Event()

        def stick(rows):
            at_it.set()
            assert go_on.wait(DEADLINE)

        batch.insert = stick
        generation = engine.submit(request())
        await asyncio.to_thread(at_it.wait, DEADLINE)
        stopping = asyncio.create_task(engine.stop(patience=0.01))
        assert isinstance(await ended(generation), EngineStopped)
        go_on.set()
        await stopping


@within_deadline
async def test_a_stalled_engine_does_not_hold_up_close(monkeypatch):
    monkeypatch.setattr("model_manager.CLOSE_GRACE", 0.01)
    async with managed(ModelSpec("m", "x"), ModelSpec("n", "y")) as (manager, factory):
        await manager.instance("m").load()
        stalled = factory.batch
        assert await answered(manager.instance("n")) == 5
        stalled.gate.clear()
        generation = await manager.instance("m").generate(request())
        await until(lambda: stalled.thread)
        await manager.close(0)
        await until(lambda: manager.instance("n").status == "unloaded")
        assert manager.instance("m").status == "draining"
        stalled.gate.set()
        assert isinstance(await ended(generation), EngineStopped)
        await until(lambda: manager.instance("m").status == "unloaded")


def test_threads_that_do_not_end_are_named():
    threads = ThreadPool(lambda: threading.Lock())
    gate = threading.Event()
    stalled = threads.start(gate.wait, "engine-stalled")
    threads.call(lambda: None)
    assert threads.close(0.01) == ["engine-stalled"]
    gate.set()
    stalled.join()


@within_deadline
async def test_a_server_that_stops_is_not_ready():
    async with managed() as (manager, _):
        assert readiness(manager, None)[0] == 200
        await manager.close(0)
        status, body = readiness(manager, None)
        assert (status, body["error"]["message"]) == (503, "The server is stopping.")


# Failed models


@within_deadline
async def test_a_model_that_keeps_failing_is_tried_less_and_less_often(monkeypatch):
    monkeypatch.setattr(timers, "FIRST_BACKOFF", 50.0)
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        factory.failures += [LoadFailed("m", "no such file")] * 3
        assert [type(await answered(instance)) for _ in range(4)] == [LoadFailed, LoadFailed, ModelFailed, ModelFailed]
        assert factory.builds == 2
        error = await answered(instance)
        assert 0 < error.retry_after <= 50
        assert "could not be loaded: no such file" in str(error)
        with pytest.raises(LoadFailed):
            await instance.load()  # an explicit load need not wait
        await manager.unload("m")
        assert (instance.status, instance.failure_reason) == ("unloaded", None)
        assert await answered(instance) == 5


def test_the_time_until_the_next_attempt_doubles_up_to_a_minute():
    backoff = Backoff()
    waits = []
    for _ in range(10):
        backoff.note_failure()
        waits.append(math.ceil(backoff.remaining))
    assert waits == [0, 1, 2, 4, 8, 16, 32, LONGEST_BACKOFF, LONGEST_BACKOFF, LONGEST_BACKOFF]
    backoff.reset()
    assert backoff.remaining == 0


@within_deadline
async def test_an_answer_resets_the_backoff():
    async with managed() as (manager, factory):
        instance = manager.instance("m")
        for _ in range(4):
            factory.failures.append(LoadFailed("m", "no such file"))
            assert isinstance(await answered(instance), LoadFailed)
            assert await answered(instance) == 5
            await instance.unload("abort")


@within_deadline
async def test_a_failed_load_has_one_line_in_the_log_with_the_key_and_the_cause(caplog):
    async with managed() as (manager, factory):
        factory.failures.append(LoadFailed("m", "line one\nline two"))
        await answered(manager.instance("m"))
        lines = [record for record in caplog.records if record.levelname == "ERROR"]
        assert [(line.message, line.fields["model"]) for line in lines] == [("failed", "m")]
        assert lines[0].fields["cause"] == "Model 'm' could not be loaded: line one line two"
