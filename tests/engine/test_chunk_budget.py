"""Measured times of chunks, and the budget of the next one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import load

from mlxserver.engine.platform.attention_memory import LARGEST_CHUNK, SMALLEST_CHUNK
from mlxserver.engine.scheduler.prefill import ChunkTimes, Prefill


def measured(*chunks):
    times = ChunkTimes()
    for tokens, seconds in chunks:
        times.note(tokens, seconds)
    return times


def test_the_overhead_of_a_chunk_is_told_apart_from_the_time_of_its_tokens():
    times = measured(*((tokens, 0.06 + 0.0008 * tokens) for tokens in (16, 72, 144, 300)))
    assert (times.base, times.each) == pytest.approx((0.06, 0.0008))
    assert times.tokens_in(0.26) == pytest.approx(250)


def test_a_few_chunks_that_waited_for_something_change_little():
    times = measured(
        *((tokens, 0.06 + 0.0008 * tokens + (0.5 if tokens == 90 else 0)) for tokens in range(20, 160, 10))
    )
    assert times.tokens_in(0.2) == pytest.approx(175, rel=0.1)


def test_while_all_chunks_are_alike_the_base_stays():
    times = measured((50, 0.1), (100, 0.15), *[(100, 0.15)] * 20)
    assert times.base == pytest.approx(0.05)
    assert times.tokens_in(0.25) == pytest.approx(200)


def test_chunks_of_one_length_alone_are_all_tokens():
    assert measured((100, 0.2), (104, 0.208)).base == pytest.approx(0, abs=1e-9)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-6, 100)), min_size=1, max_size=30), st.floats(0.001, 60))
def test_a_chunk_has_a_size_whatever_was_measured(chunks, seconds):
    times = measured(*chunks)
    assert times.each > 0
    assert times.base >= 0
    assert times.tokens_in(seconds) <= seconds / times.each


@pytest.fixture(scope="module")
def prefill(tiny_llama_path):
    prefill = Prefill(load(str(tiny_llama_path))[0], stall_target=0.25)
    prefill.times.each = 0.001
    return prefill


@pytest.mark.parametrize(
    ("own_step_seconds", "waiting_ratio", "tokens"),
    [
        (0.0, 1.0, 1000),  # nothing streams
        (0.01, 1.0, 30),  # three steps
        (0.01, 5.0, 150),
        (0.1, 1.0, 150),  # the stall target, less the step that follows
        (0.05, 9.0, 200),
        (0.2, 1.0, 200),  # a slow model's prompts get half of its time
        (0.001, 1.0, SMALLEST_CHUNK),
    ],
)
def test_a_chunk_with_the_step_behind_it_keeps_the_stall_target(prefill, own_step_seconds, waiting_ratio, tokens):
    assert prefill.budget(own_step_seconds, 0.0, waiting_ratio).tokens == tokens


def test_a_chunk_takes_at_least_twice_the_overhead(prefill):
    prefill.times.base = 0.05
    assert prefill.budget(0.01, 0.0).tokens == pytest.approx(50, abs=1)
    assert prefill.budget(0.04, 0.0).tokens == pytest.approx(70, abs=1)
    assert prefill.budget(0.0, 0.07).tokens == pytest.approx(200 if prefill._strategy.yields_cores else 20, abs=1)
    prefill.times.base = 0.0


def test_a_chunk_is_never_longer_than_fits_a_device(prefill):
    prefill.times.each = 1e-6
    assert prefill.budget(0.0, 0.0).tokens == LARGEST_CHUNK
    prefill.times.each = 0.001
