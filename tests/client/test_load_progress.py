"""Progress of a load: a stream of its own; progress of what an answer waits for: comments in its stream."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxserver.client.errors import ClientError, LoadFailed
from mlxserver.client.models import Loaded, LoadReader, Prefill, Progress, QueuePosition, read_comment
from mlxserver.client.stream import StreamReader
from mlxserver.client.views import format_amount, format_progress
from tests.support.scripted_server import LOADS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.integers(0, 400))
def test_any_cut_of_a_loads_stream_gives_the_same_progress(cut):
    raw, reader = b"".join(LOADS["org/stepwise"]), LoadReader("key")
    events = [*reader.feed(raw[:cut]), *reader.feed(raw[cut:])]
    assert events == [
        Progress("downloading", 1_000_000, 4_000_000),
        Progress("downloading", 4_000_000, 4_000_000),
        Progress("warming"),
        Loaded("stepwise", 2.5),
    ]
    assert [format_amount(event) for event in events[:3]] == ["1.0 MB of 4.0 MB", "4.0 MB of 4.0 MB", ""]


@given(st.binary())
def test_any_bytes_as_a_loads_stream_are_events_or_a_client_error(received):
    try:
        assert all(isinstance(event, Progress | Loaded) for event in LoadReader("key").feed(received))
    except ClientError as error:
        assert str(error)


def test_a_failed_load_raises_the_servers_message():
    with pytest.raises(LoadFailed, match="no weights"):
        list(LoadReader("key").feed(b"".join(LOADS["org/stumbler"])))


@given(st.text())
def test_any_comment_is_progress_of_a_load_or_ignored(comment):
    assert read_comment(f": {comment}") is None
    for name in ("loading", "queue", "prefill"):
        assert read_comment(f"{name} {comment}") is None or comment.strip().startswith("{")


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("stage", "done", "total"), JSON)))
@example({"stage": "reading", "done": 10**400, "total": float("nan")})
@example({"stage": "two\nlines", "done": 1, "total": float("inf")})
def test_any_progress_of_a_load_is_one_line(step):
    line = format_progress(read_comment(f"loading {json.dumps(step)}"))
    assert line.startswith("The model is being loaded: ") and "\n" not in line


@pytest.mark.parametrize(
    ("comment", "step", "line"),
    [
        ('queue {"position":3}', QueuePosition(3), "Waiting for a free slot, number 3 in the queue"),
        ("queue {}", QueuePosition(), "Waiting for a free slot"),
        (
            'prefill {"done":1024,"total":60000}',
            Prefill(1024, 60000),
            "The prompt is being read: 1024 of 60000 tokens",
        ),
        ('prefill {"done":0,"total":0}', Prefill(0), "The prompt is being read"),
    ],
)
def test_what_else_an_answer_waits_for_is_one_line(comment, step, line):
    assert read_comment(comment) == step
    assert format_progress(step) == line


def test_progress_after_the_beginning_of_an_answer_is_not_shown():
    reported = []
    reader = StreamReader(reported.append)
    start, more = b': prefill {"done":1,"total":9}\n\n', b': prefill {"done":2,"total":9}\n\n'
    delta = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'
    assert [event.text for event in reader.feed(start + delta, 0.0)] == ["Hi"]
    assert not list(reader.feed(more, 0.0))
    assert reported == [Prefill(1, 9)]
