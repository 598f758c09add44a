"""Warm-up in idle moments: which shapes, in which order, and that requests go first."""

import asyncio
import threading
from contextlib import asynccontextmanager
from functools import cache

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import EngineUnloaded
from mlxserver.engine.events import Usage
from mlxserver.engine.kv_pool import KVPool
from mlxserver.engine.platform.policy import CPU, CUDA, METAL
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.scheduler.execution import make_prefill_strategy
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.scheduler.warm_up import ChunkShape, DecodeShape, lengths_up_to
from mlxserver.engine.worker import engine_thread
from mlxserver.engine.worker.engine import Engine
from mlxserver.engine.worker.runner import PAUSE
from tests.support.architectures import random_model
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.scripted_engine import DEADLINE, ScriptedRunner, read, request, within_deadline
from tools.harness.models import tiny_llama


def warmed(policy, longest, name="llama", most_tokens=None, num_layers=4, **fields):
    scheduler = Scheduler(random_model(name, num_hidden_layers=num_layers), max_running=4, policy=policy, **fields)
    return scheduler, list(scheduler.warm_up(longest, most_tokens))


@cache
def warmed_up_on_cuda():
    """A scheduler and all that it computes for sequences of up to 2048 tokens; the shapes are those of any depth."""
    return warmed(CUDA, 2048, num_layers=1)


def test_a_cpu_has_nothing_to_warm_up():
    assert warmed(CPU, 4096)[1] == []


def test_short_requests_come_first_and_each_shape_once(without_compilation):
    scheduler, shapes = warmed_up_on_cuda()
    assert scheduler.is_empty()
    assert len(set(shapes)) == len(shapes)
    assert shapes[0] == ChunkShape(1, 256, 512)
    decodes = [shape.lengths for shape in shapes if isinstance(shape, DecodeShape)]
    assert [max(lengths) for lengths in decodes] == sorted(max(lengths) for lengths in decodes)
    assert {len(lengths) for lengths in decodes if len(set(lengths)) == 1} == {1, 2, 4}
    assert max(shape.capacity for shape in shapes if isinstance(shape, ChunkShape)) == 2048
    assert {lengths for lengths in decodes if len(set(lengths)) > 1} == {
        (*(short,) * count, 2046) for short in (33, 1022) for count in (1, 2)
    }


def test_a_prompt_of_any_length_finds_its_chunks_warmed_up(without_compilation):
    model = random_model("llama", num_hidden_layers=1)
    shapes = set(Scheduler(model, max_running=1, policy=CUDA).warm_up(3072))
    chunks = make_prefill_strategy(model, CUDA)
    assert shapes >= {ChunkShape(*sizes) for length in range(1, 3073, 50) for sizes in chunks.shapes(length)}


def decode_shapes(scheduler):
    """The shapes of the decode steps that a scheduler makes from now on."""
    shapes, cache = set(), scheduler._running.cache
    advance = cache.advance

    def recorded(*arguments):
        logits = advance(*arguments)
        shapes.add(cache.shape)
        return logits

    cache.advance = recorded
    return shapes


def test_a_long_conversation_beside_short_ones_finds_its_steps_warmed_up(without_compilation):
    scheduler = Scheduler(random_model("llama", num_hidden_layers=1), max_running=12, policy=CUDA)
    shapes = decode_shapes(scheduler)
    for _ in scheduler.warm_up(4096):
        pass
    known = {*shapes}
    for long, others in [(1100, (30, 200)), (2000, (20, 25, 230)), (3000, (900, 1000, 40, 300)), (1020, (250,))]:
        lengths = (long, *others)
        Driver(scheduler, *(sequence(n, prompt(length, n), max_tokens=8) for n, length in enumerate(lengths))).finish()
    assert shapes == known


@pytest.mark.parametrize("max_running", [1, 3, 4, 6])
def test_any_number_of_requests_finds_its_steps_warmed_up(max_running, without_compilation):
    scheduler = Scheduler(random_model("llama", num_hidden_layers=1), max_running=max_running, policy=CUDA)
    shapes = decode_shapes(scheduler)
    for _ in scheduler.warm_up(256):
        pass
    known = {*shapes}
    for count in range(1, max_running + 1):
        Driver(scheduler, *(sequence(n, prompt(20, n), max_tokens=4) for n in range(count))).finish()
    assert shapes == known


def test_steps_of_each_number_of_classes_are_warmed_up(without_compilation):
    """The kernel of their attention is another one for each number."""
    scheduler = Scheduler(random_model("llama", num_hidden_layers=1), max_running=8, policy=CUDA)
    shapes = decode_shapes(scheduler)
    for _ in scheduler.warm_up(8192):
        pass
    assert {len(shape) for shape in shapes} == {1, 2, 3, 4}


@pytest.mark.parametrize("name", ["gemma3_text", "nemotron_h"])
def test_where_lengths_make_no_shapes_only_numbers_of_requests_are_warmed_up(name, without_compilation):
    assert {len(shape.lengths) for shape in warmed(CUDA, 4096, name)[1]} == {1, 2, 4}
    assert {max(shape.lengths) for shape in warmed(METAL, 4096)[1]} == {33}


def test_a_batch_gives_the_same_tokens_after_any_part_of_its_warm_up(without_compilation):
    model = random_model("llama")
    expected = Driver(Scheduler(model, policy=CUDA), sequence(1, prompt(30)), sequence(2, prompt(300))).finish()
    scheduler = Scheduler(model, max_running=4, policy=CUDA)
    steps = scheduler.warm_up(1024)
    for _ in range(12):
        next(steps)
    assert Driver(scheduler, sequence(1, prompt(30)), sequence(2, prompt(300))).finish() == expected
    next(steps)
    assert Driver(scheduler, sequence(1, prompt(30)), sequence(2, prompt(300))).finish() == expected


def test_a_shape_that_does_not_fit_is_left_out_and_nothing_stays_borrowed(without_compilation):
    pool = KVPool()
    pool.publish(1 << 21, 0, {})
    account = pool.open("m", 0)
    shapes = warmed(CUDA, 2048, account=account)[1]
    everything = warmed_up_on_cuda()[1]
    assert 0 < len(shapes) < len(everything)
    assert shapes == [shape for shape in everything if shape in shapes]
    assert pool.total_over == 0
    assert max(shape.kv_tokens for shape in warmed(CUDA, 2048, most_tokens=2048)[1]) == 1024


def test_lengths_fill_slots_of_ascending_capacity():
    assert lengths_up_to(4096) == [256, 512, 768, 1024, 1536, 2048, 3072, 4096]


def test_a_loaded_model_has_its_warm_up_as_idle_work(tmp_path, without_compilation):
    spec = ModelSpec("m", str(tiny_llama(tmp_path / "m", hidden=64, layers=2)), max_running=2, cache_tokens=1024)
    runner = Builder(stall_target=10.0, policy=CUDA).build(spec)
    assert next(runner.idle_steps) == ChunkShape(1, 256, 512)
    runner.batch.close()


# -- on the engine thread -------------------------------------------------------------------------------------------


class Idle:
    """Idle work of five steps, each of which waits at a gate. The third raises `failure`, if any."""

    def __init__(self, failure=None):
        self.runner = ScriptedRunner()
        self.runner.idle_steps = self.steps()
        self.gate, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.failure = failure
        self.done = 0
        self.is_over = False

    def steps(self):
        try:
            while self.done < 5:
                assert self.runner.batch.is_empty()
                self.begun.release()
                assert self.gate.acquire(timeout=DEADLINE)
                self.done += 1
                if self.done == 3 and self.failure:
                    raise self.failure
                yield
        finally:
            self.is_over = True

    async def until_begun(self, count=1):
        for _ in range(count):
            assert await asyncio.to_thread(self.begun.acquire, timeout=DEADLINE)


@asynccontextmanager
async def idle_engine(failure=None):
    """An engine whose thread is in the first step of its idle work."""
    idle = Idle(failure)
    engine = Engine("key", lambda: idle.runner)
    try:
        await engine.started()
        await idle.until_begun()
        yield engine, idle
    finally:
        idle.gate.release(5)
        await engine.stop()


@within_deadline
async def test_a_request_goes_before_the_next_step_of_idle_work_which_goes_on_behind_it():
    async with idle_engine() as (engine, idle):
        generation = engine.submit(request(max_tokens=3))
        idle.gate.release()
        assert (await read(generation))[-1] == Usage(5, 3)
        assert idle.done == 1
        await idle.until_begun()
        idle.gate.release(4)
        await idle.until_begun(3)
        assert (await read(engine.submit(request(max_tokens=2))))[-1] == Usage(5, 2)
        assert idle.is_over


@within_deadline
async def test_idle_work_does_not_begin_between_two_requests_that_follow_each_other(monkeypatch):
    monkeypatch.setattr(engine_thread, "_QUIET_SECONDS", 2 * DEADLINE)
    async with idle_engine() as (engine, idle):
        first = engine.submit(request(max_tokens=3))
        idle.gate.release(5)
        await read(first)
        for _ in range(3):
            assert (await read(engine.submit(request(max_tokens=2))))[-1] == Usage(5, 2)
        assert idle.done == 1


@within_deadline
async def test_an_engine_is_unloaded_in_the_middle_of_its_idle_work():
    async with idle_engine() as (engine, idle):
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)  # its message is in the mailbox before the step ends
        idle.gate.release()
        await stopping
        assert (idle.done, idle.runner.batch.is_closed) == (1, True)
        with pytest.raises(EngineUnloaded):
            await engine.started()


@within_deadline
async def test_idle_work_that_fails_is_given_up_and_requests_go_on(caplog):
    async with idle_engine(MemoryError("no memory")) as (engine, idle):
        idle.gate.release(3)
        await idle.until_begun(2)
        assert (await read(engine.submit(request(max_tokens=3))))[-1] == Usage(5, 3)
        assert (idle.done, idle.is_over, idle.runner.batch.restarts) == (3, True, 0)
        assert "idle work ends: MemoryError: no memory" in caplog.text


@within_deadline
async def test_a_request_is_answered_at_once_while_idle_work_is_paused():
    runner = ScriptedRunner()
    paused = threading.Event()

    def steps():
        while True:
            paused.set()
            yield PAUSE

    runner.idle_steps = steps()
    engine = Engine("key", lambda: runner)
    await engine.started()
    assert await asyncio.to_thread(paused.wait, DEADLINE)
    assert (await read(engine.submit(request(max_tokens=3))))[-1] == Usage(5, 3)
    await engine.stop()
