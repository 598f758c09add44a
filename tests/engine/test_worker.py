"""The engine thread at the Batch seam: the events that readers get, in what order, and however it ends."""

import asyncio
import threading
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import pytest

from mlxserver.engine.errors import EngineStopped, EngineUnloaded, LoadFailed, PromptRejected, RequestFailed
from mlxserver.engine.events import Accepted, Delta, Finish, Usage
from mlxserver.engine.requests import JsonFormat
from mlxserver.engine.worker.engine import Engine
from tests.support.scripted_engine import (
    DEADLINE,
    Death,
    Factory,
    ScriptedBatch,
    ScriptedLaunches,
    read,
    request,
    until,
    within_deadline,
)


@asynccontextmanager
async def running_engine(factory=None, **options):
    """An engine and the factory of its batch; loaded, and stopped at the end."""
    factory = factory or Factory()
    engine = Engine("key", factory.build, **options)
    try:
        await engine.started()
        yield engine, factory
    finally:
        if factory.runners:
            factory.batch.gate.set()
        await engine.stop()


async def until_events(generation, count):
    """Read until so many events have come."""
    events = []
    while len(events) < count:
        events += await generation.events()
    return events


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]


@within_deadline
async def test_the_events_of_a_generation_are_accepted_deltas_finish_and_usage():
    async with running_engine() as (engine, _):
        generation = engine.submit(request("hello", max_tokens=3))
        assert await generation.accepted() == Accepted(5)
        assert await read(generation) == [Delta("0"), Delta("1"), Delta("2"), Finish("length"), Usage(5, 3)]
        assert generation.is_done
        assert await generation.events() == []


@within_deadline
async def test_the_events_of_a_step_arrive_while_the_next_one_that_was_launched_goes_on():
    async with running_engine(Factory(make_batch=ScriptedLaunches)) as (engine, factory):
        generation = engine.submit(request(max_tokens=None))
        events = await until_events(generation, 2)
        batch = factory.batch
        batch.gate.clear()  # the next step is launched, and does not end
        await until(lambda: batch.launched == batch.sequences[0] + 1)
        while len(events) <= batch.sequences[0]:
            events += await generation.events()
        assert events == [Accepted(5), *(Delta(str(number)) for number in range(len(events) - 1))]


@within_deadline
async def test_events_that_wait_for_a_launch_are_in_order_and_before_the_end():
    async with running_engine(Factory(make_batch=ScriptedLaunches)) as (engine, _):
        short, long = engine.submit(request(max_tokens=2)), engine.submit(request(max_tokens=None))
        assert await short.accepted() == Accepted(5)
        assert await read(short) == [Delta("0"), Delta("1"), Finish("length"), Usage(5, 2)]
        long.close()
        assert await long.accepted() == Accepted(5)
        events = await read(long)
        assert events == [Delta(str(number)) for number in range(len(events))]


class Recorded(ScriptedBatch):
    """Keeps the names of its calls. holds: steps that begin wait for `released`; is_held: one does."""

    def __post_init__(self):
        super().__post_init__()
        self.calls, self.holds, self.is_held, self.released = [], False, False, threading.Event()

    def insert(self, sequences):
        self.calls.append("insert")
        super().insert(sequences)

    def decode(self):
        self.calls.append("decode")
        if self.holds:
            self.is_held = True
            assert self.released.wait(DEADLINE)
        return super().decode()

    def prefill(self):
        self.calls.append("prefill")
        super().prefill()


@within_deadline
async def test_the_prompt_of_a_request_that_comes_during_a_step_is_processed_before_the_next_step():
    async with running_engine(Factory(make_batch=Recorded)) as (engine, factory):
        await until_events(engine.submit(request(max_tokens=None)), 3)
        batch = factory.batch
        batch.holds = True
        await until(lambda: batch.is_held)
        later, calls = engine.submit(request(max_tokens=2)), len(batch.calls)
        batch.released.set()
        assert (await read(later))[-1] == Usage(5, 2)
        assert batch.calls[calls : calls + 3] == ["insert", "prefill", "decode"]


@within_deadline
async def test_the_facts_of_the_model_are_known_at_the_start():
    async with running_engine() as (engine, factory):
        assert await engine.started() == factory.runners[0].facts


@within_deadline
async def test_a_request_is_formatted_while_the_others_go_on():
    async with running_engine() as (engine, factory):
        factory.runners[0].formatting.clear()
        formatting = asyncio.create_task(engine.preprocess(replace(request(), format=JsonFormat())))
        assert (await read(engine.submit(request(max_tokens=5))))[-1] == Usage(5, 5)
        assert not formatting.done()
        factory.runners[0].formatting.set()
        await formatting


@within_deadline
async def test_the_prompts_of_one_model_hold_up_no_other():
    async with running_engine() as (busy, factory), running_engine() as (other, _):
        factory.runners[0].formatting.clear()
        held = [asyncio.create_task(busy.preprocess(replace(request(), format=JsonFormat()))) for _ in range(20)]
        assert await other.preprocess(request("hello")) == request("hello")
        held.pop().cancel()
        factory.runners[0].formatting.set()
        assert len(await asyncio.gather(*held)) == 19


@within_deadline
async def test_a_grammar_that_is_refused_raises_for_its_request():
    async with running_engine() as (engine, _):
        with pytest.raises(PromptRejected, match="no such schema"):
            await engine.preprocess(replace(request("refuse"), format=JsonFormat()))


@within_deadline
async def test_many_generations_run_side_by_side():
    async with running_engine() as (engine, factory):
        generations = [engine.submit(request(max_tokens=n)) for n in range(1, 20)]
        for n, generation in enumerate(generations, 1):
            await generation.accepted()
            assert len(await read(generation)) == n + 2
        await until(lambda: factory.batch.sequences == {})


@within_deadline
async def test_running_requests_are_those_that_hold_a_slot():
    async with running_engine() as (engine, factory):
        assert engine.num_running == 0
        factory.batch.slots = 3
        generations = [engine.submit(replace(request(), n=2)) for _ in range(3)]
        await until(lambda: engine.num_running == 2)
        generations[0].close()
        await until(lambda: factory.batch.running == set(range(2, 5)))
        await until(lambda: engine.num_running == 2)
        for generation in generations:
            generation.close()
        await until(lambda: engine.num_running == 0)
        engine.submit(request())
        await until(lambda: engine.num_running == 1)
    assert engine.num_running == 0


@within_deadline
async def test_one_step_of_the_batch_is_one_hand_over():
    """Where one reader finds the events of a step, the others' are there as well."""
    async with running_engine() as (engine, factory):
        factory.batch.gate.clear()
        generations = [engine.submit(request(max_tokens=1)) for _ in range(5)]
        for generation in generations:
            await generation.accepted()
        await until(lambda: len(factory.batch.sequences) == 5)
        factory.batch.gate.set()
        await generations[0].events()
        for generation in generations[1:]:
            with pytest.raises(StopIteration):  # it returns without waiting
                generation.events().send(None)


@within_deadline
async def test_closing_frees_the_slot_and_no_other():
    async with running_engine() as (engine, factory):
        leaving, staying = engine.submit(request()), engine.submit(request())
        done = asyncio.Event()
        leaving.on_done = done.set
        await leaving.accepted()
        await until_events(leaving, 1)
        leaving.close()
        leaving.close()
        await done.wait()
        assert leaving.is_done
        assert len(factory.batch.sequences) == 1
        await staying.accepted()
        await until_events(staying, 5)
        staying.close()


@within_deadline
async def test_closing_before_the_request_was_even_taken_frees_its_slot():
    async with running_engine() as (engine, factory):
        factory.batch.gate.clear()
        first = engine.submit(request())
        await first.accepted()
        await until(lambda: factory.batch.thread)
        second = engine.submit(request())
        done = asyncio.Event()
        second.on_done = done.set
        second.close()
        factory.batch.gate.set()
        await done.wait()
        assert len(factory.batch.sequences) == 1
        first.close()


@within_deadline
async def test_on_done_is_called_once_in_every_ending():
    async with running_engine() as (engine, _):
        counts = []
        for text, max_tokens in (("hello", 2), ("hello", None), ("refuse", 2), ("break", 2)):
            calls = []
            generation = engine.submit(request(text, max_tokens))
            generation.on_done = lambda calls=calls: calls.append(1)
            if max_tokens is None:
                generation.close()
            await until(lambda generation=generation: generation.is_done)
            generation.close()
            counts.append(calls)
        await engine.submit(request(max_tokens=1)).accepted()
        assert counts == [[1]] * 4


@within_deadline
async def test_a_slot_is_free_before_anything_was_read():
    """A reader that never reads keeps no slot and delays no other."""
    async with running_engine() as (engine, factory):
        never_read = engine.submit(request(max_tokens=50))
        for _ in range(3):
            generation = engine.submit(request(max_tokens=50))
            await generation.accepted()
            assert len(await read(generation)) == 52
        await until(lambda: never_read.is_done and factory.batch.sequences == {})
        await never_read.accepted()
        assert len(await read(never_read)) == 52


@within_deadline
async def test_a_rejected_prompt_raises_and_disturbs_no_other():
    async with running_engine() as (engine, _):
        other = engine.submit(request(max_tokens=20))
        with pytest.raises(PromptRejected, match="refused") as caught:
            await engine.submit(request("refuse")).accepted()
        assert caught.value.param == "messages[0]"
        await other.accepted()
        assert len(await read(other)) == 22


@within_deadline
async def test_an_unplanned_fault_of_one_request_fails_that_one_alone():
    async with running_engine() as (engine, _):
        other = engine.submit(request(max_tokens=20))
        with pytest.raises(RequestFailed, match="'key' could not process this request: ZeroDivisionError"):
            await engine.submit(request("break")).accepted()
        await other.accepted()
        assert len(await read(other)) == 22


@within_deadline
async def test_a_crash_reaches_every_reader_and_every_later_request():
    deaths = []
    async with running_engine(on_death=deaths.append) as (engine, factory):
        running = [engine.submit(request()) for _ in range(3)]
        for generation in running:
            await generation.accepted()
        factory.batch.gate.clear()
        unseen = engine.submit(request())
        factory.batch.crash = Death("out of luck")
        factory.batch.gate.set()
        for generation in running:
            with pytest.raises(EngineStopped, match="'key' stopped: Death: out of luck"):
                await read(generation)
        with pytest.raises(EngineStopped):
            await unseen.accepted()
            await read(unseen)
        with pytest.raises(EngineStopped, match="Death: out of luck"):
            await engine.submit(request()).accepted()
        assert [str(error) for error in deaths] == ["The engine of model 'key' stopped: Death: out of luck"]
        assert factory.batch.is_closed


@within_deadline
async def test_events_from_before_a_crash_still_arrive():
    async with running_engine() as (engine, factory):
        generation = engine.submit(request())
        await generation.accepted()
        await until(lambda: factory.batch.sequences and max(factory.batch.sequences.values()) > 3)
        factory.batch.crash = Death("out of luck")
        deltas = []
        with pytest.raises(EngineStopped):
            while True:
                deltas += await generation.events()
        assert [delta.text for delta in deltas] == [str(n) for n in range(len(deltas))]
        assert len(deltas) > 3


@within_deadline
async def test_a_failed_load_raises_for_all_waiters():
    factory, deaths, freed = Factory(failures=[LoadFailed("key", "no such file")]), [], []
    factory.gate.clear()
    engine = Engine("key", factory.build, free=lambda: freed.append(1), on_death=deaths.append)
    early = engine.submit(request())
    waiting = asyncio.gather(engine.started(), engine.started(), early.accepted(), return_exceptions=True)
    factory.gate.set()
    assert [str(error) for error in await waiting] == ["Model 'key' could not be loaded: no such file"] * 3
    with pytest.raises(LoadFailed):
        await engine.started()
    await engine.stop()
    assert freed == [1]


@within_deadline
async def test_an_unplanned_fault_of_a_load_is_a_failed_load():
    engine = Engine("key", Factory(failures=[ZeroDivisionError("a bug")]).build)
    with pytest.raises(LoadFailed, match="'key' could not be loaded: ZeroDivisionError: a bug"):
        await engine.started()
    await engine.stop()


@within_deadline
async def test_a_model_that_dies_as_soon_as_it_is_loaded_never_counts_as_started():
    factory = Factory()

    def build():
        runner = factory.build()
        runner.batch.is_empty = lambda: 1 / 0
        return runner

    engine = Engine("key", build)
    engine._thread.join(DEADLINE)
    with pytest.raises(EngineStopped):
        await engine.started()
    await engine.stop()


@within_deadline
async def test_requests_that_come_while_the_model_loads_are_answered_after_it():
    factory = Factory()
    factory.gate.clear()
    engine = Engine("key", factory.build)
    generation = engine.submit(request(max_tokens=2))
    factory.gate.set()
    assert await generation.accepted() == Accepted(5)
    assert len(await read(generation)) == 4
    await engine.stop()


@within_deadline
async def test_stopping_raises_for_all_waiters():
    deaths, freed = [], []
    async with running_engine(on_death=deaths.append, free=lambda: freed.append(1)) as (engine, factory):
        generations = [engine.submit(request()) for _ in range(3)]
        for generation in generations:
            await generation.accepted()
        stopping = asyncio.create_task(engine.stop())
        for generation in generations:
            with pytest.raises(EngineStopped, match="the model was unloaded"):
                await read(generation)
        await stopping
        late = engine.submit(request())
        with pytest.raises(EngineStopped):
            await late.accepted()
        assert (deaths, freed, factory.batch.is_closed) == ([], [1], True)


@within_deadline
async def test_stopping_ends_and_joins_the_thread():
    async with running_engine() as (engine, _):
        assert len(engine_threads()) == 1
        await engine.stop()
        assert engine_threads() == []
        await engine.stop()


@within_deadline
async def test_stopping_while_the_model_loads_waits_for_the_load():
    factory = Factory()
    factory.gate.clear()
    engine = Engine("key", factory.build)
    stopping = asyncio.create_task(engine.stop())
    await asyncio.sleep(0)
    factory.gate.set()
    await stopping
    assert engine_threads() == []
    assert factory.batch.is_closed


@within_deadline
async def test_everything_of_the_model_happens_on_one_thread():
    factory, threads = Factory(), []

    def note(name):
        threads.append((name, threading.current_thread()))

    @contextmanager
    def stream():
        note("enter")
        yield
        note("exit")

    def build():
        note("build")
        return factory.build()

    engine = Engine("key", build, stream=stream, free=lambda: note("free"))
    await engine.started()
    generation = engine.submit(request(max_tokens=1))
    await generation.accepted()
    await read(generation)
    await engine.stop()
    assert [name for name, _ in threads] == ["enter", "build", "exit", "free"]
    assert {thread for _, thread in threads} == {factory.batch.thread}
    assert factory.batch.thread is not threading.current_thread()


@within_deadline
async def test_a_request_is_running_while_it_holds_a_slot():
    async with running_engine() as (engine, factory):
        factory.batch.slots = 3
        generations = [engine.submit(replace(request(), n=2)) for _ in range(3)]
        await until(lambda: engine.num_running == 2)  # one of them with one slot of two
        generations[0].close()
        generations[1].close()
        await until(lambda: engine.num_running == 1)
        generations[2].close()
        await until(lambda: engine.num_running == 0)


@within_deadline
async def test_even_a_failing_release_leaves_no_waiter():
    def free():
        raise OSError("the release failed")

    engine = Engine("key", Factory().build, free=free)
    generation = engine.submit(request())
    await generation.accepted()
    stopping = asyncio.create_task(engine.stop())
    with pytest.raises(EngineStopped):
        await read(generation)
    await stopping


@within_deadline
async def test_an_error_keeps_nothing_of_the_engine_alive():
    """Its traceback would hold the frames, and with them the model's memory."""
    async with running_engine() as (engine, _):
        generation = engine.submit(request("refuse"))
        await until(lambda: generation.is_done)
        assert (generation._error.__traceback__, generation._error.__cause__) == (None, None)


def test_a_loop_that_closes_first_does_not_keep_the_thread():
    factory = Factory(failures=[LoadFailed("key", "no such file")])

    async def leave():
        factory.gate.clear()
        return Engine("key", factory.build)

    asyncio.run(leave())
    factory.gate.set()
    for thread in engine_threads():
        thread.join(DEADLINE)
    assert engine_threads() == []


@within_deadline
async def test_a_request_in_preparation_when_the_model_is_unloaded_fails_as_unloaded():
    async with running_engine() as (engine, factory):
        factory.runners[0].formatting.clear()
        slow, next_one = (
            asyncio.create_task(engine.preprocess(replace(request(), format=JsonFormat()))) for _ in range(2)
        )
        await asyncio.sleep(0)
        await engine.stop()
        factory.runners[0].formatting.set()
        with pytest.raises(EngineUnloaded):
            await next_one
        with pytest.raises(EngineUnloaded):
            await engine.submit(await slow).accepted()
        with pytest.raises(EngineUnloaded):
            await engine.preprocess(request())
