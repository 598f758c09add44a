"""ThreadPool that are used again."""

import threading
from contextlib import contextmanager

import pytest

from mlxserver.engine.worker.thread_pool import ThreadPool


@pytest.fixture
def seen():
    return []


@pytest.fixture
def threads(seen):
    @contextmanager
    def stream():
        seen.append("begun")
        yield
        seen.append("ended")

    threads = ThreadPool(stream)
    yield threads
    threads.close()


def test_work_after_work_is_done_on_one_thread(threads, seen):
    idents = {threads.call(threading.get_ident) for _ in range(5)}
    assert len(idents) == 1
    assert threading.get_ident() not in idents
    threads.close()
    assert seen == ["begun", "ended"]


def test_work_at_once_is_done_on_several(threads, seen):
    gate = threading.Barrier(3)
    shifts = [threads.start(gate.wait, "work") for _ in range(2)]
    gate.wait()
    for shift in shifts:
        shift.join()
    assert seen == ["begun", "begun"]


def test_what_work_raises_is_raised_and_the_thread_goes_on(threads, seen):
    with pytest.raises(ZeroDivisionError):
        threads.call(lambda: 1 / 0)
    assert threads.call(lambda: 5) == 5
    assert seen == ["begun"]


def test_work_that_comes_too_late_is_refused_and_leaves_no_thread(threads, seen):
    threads.call(lambda: 5)
    threads.close()
    for late in threads.call, lambda work: threads.start(work, "late"):
        with pytest.raises(RuntimeError, match="they are closed"):
            late(lambda: 5)
    assert seen == ["begun", "ended"]


def test_closing_waits_for_the_work(threads):
    gate, done = threading.Event(), []
    threads.start(lambda: (gate.wait(), done.append(1)), "work")
    closing = threading.Thread(target=threads.close)
    closing.start()
    gate.set()
    closing.join()
    assert done == [1]
