"""Recordings of streamed answers: any cut of the received bytes gives the same events, each with its arrival time."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.client.errors import ClientError, StreamBroken
from mlxserver.client.events import Content, Finished, Reasoning
from mlxserver.client.recorder import Recording
from mlxserver.client.stream import StreamReader
from tests.support.scripted_server import STREAMS

EVENTS = STREAMS["thinker"]
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\nContent-type: text/event-stream\r\n\r\n" + b"".join(EVENTS)
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = CHUNKED_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*EVENTS, b""])


def recording(raw, cuts=()):
    """The response in pieces, the nth with arrival time n."""
    edges = [0, *sorted(cuts), len(raw)]
    return Recording(0.0, tuple((float(n), raw[a:b]) for n, (a, b) in enumerate(itertools.pairwise(edges), 1)), 99.0)


@pytest.mark.parametrize("raw", [UNTIL_CLOSE, CHUNKED], ids=["until close", "chunked"])
@given(fractions=st.lists(st.floats(0, 1), max_size=8))
def test_every_cut_gives_the_same_events_and_each_arrives_with_its_last_byte(raw, fractions):
    recorded = recording(raw, [int(fraction * len(raw)) for fraction in fractions])
    *pieces, finished = recorded.events()
    assert "".join(event.text for event in pieces if isinstance(event, Reasoning)) == "17 + 25 is 42"
    assert "".join(event.text for event in pieces if isinstance(event, Content)) == "42\n\n"
    assert isinstance(finished, Finished)
    assert not any(isinstance(event, Finished) for event in pieces)
    sent = [part for part in EVENTS if b'"content"' in part or b"reasoning_content" in part] + [b"data: [DONE]\n\n"]
    for event, part in zip([*pieces, finished], sent, strict=True):
        received = b"".join(data for at, data in recorded.reads if at <= event.at)
        before = b"".join(data for at, data in recorded.reads if at < event.at)
        assert part in received
        assert part not in before


@given(length=st.integers(0, len(CHUNKED) - 1))
def test_a_response_cut_short_is_broken_unless_its_stream_had_ended(length):
    recorded = recording(CHUNKED[:length])
    try:
        events = recorded.events()
    except StreamBroken as error:
        assert (length < len(CHUNKED_HEAD)) == ("before the head of a response" in str(error))
    else:
        assert events == recording(CHUNKED).events()
        assert b"[DONE]" in CHUNKED[:length]


def test_a_response_without_a_head_names_the_failure_of_the_connection():
    with pytest.raises(StreamBroken, match="nothing came for 5 s"):
        Recording(0.0, (), 5.0, "nothing came for 5 s.").events()


@given(st.binary())
def test_any_bytes_as_a_response_are_events_or_a_client_error(received):
    try:
        assert recording(received).events()
    except ClientError as error:
        assert str(error)


def test_bytes_after_the_end_of_a_stream_are_ignored():
    reader = StreamReader()
    assert [type(e).__name__ for e in reader.feed(b"".join(STREAMS["talker"]) * 2, 1.0)].count("Finished") == 1
    assert list(reader.end(2.0)) == []
