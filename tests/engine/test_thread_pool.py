"""Threads of the pool are reused."""

import threading
from contextlib import contextmanager

import pytest

from mlxserver.engine.worker.thread_pool import ThreadPool


@pytest.fixture
def seen():
    return []


@pytest.fixture
def pool(seen):
    @contextmanager
    def stream():
        seen.append("begun")
        yield
        seen.append("ended")

    pool = ThreadPool(stream)
    yield pool
    pool.close()


def test_work_after_work_is_done_on_one_thread(pool, seen):
    idents = {pool.call(threading.get_ident) for _ in range(5)}
    assert len(idents) == 1
    assert threading.get_ident() not in idents
    pool.close()
    assert seen == ["begun", "ended"]


def test_work_at_once_is_done_on_several(pool, seen):
    gate = threading.Barrier(3)
    tasks = [pool.start(gate.wait, "work") for _ in range(2)]
    gate.wait()
    for task in tasks:
        task.join()
    assert seen == ["begun", "begun"]


def test_what_work_raises_is_raised_and_the_thread_goes_on(pool, seen):
    with pytest.raises(ZeroDivisionError):
        pool.call(lambda: 1 / 0)
    assert pool.call(lambda: 5) == 5
    assert seen == ["begun"]


def test_work_that_comes_too_late_is_refused_and_leaves_no_thread(pool, seen):
    pool.call(lambda: 5)
    pool.close()
    for late in pool.call, lambda work: pool.start(work, "late"):
        with pytest.raises(RuntimeError, match="the pool is closed"):
            late(lambda: 5)
    assert seen == ["begun", "ended"]


def test_closing_waits_for_the_work(pool):
    gate, done = threading.Event(), []
    pool.start(lambda: (gate.wait(), done.append(1)), "work")
    closing = threading.Thread(target=pool.close)
    closing.start()
    gate.set()
    closing.join()
    assert done == [1]
