"""Server-sent events survive any cut of their bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.api.sse import DONE, SSEDecoder, comment, encode

LINES = [b"data: one", b"data:two", b"data:  three", b"data", b"data:", b": a comment", b"", b"", b"event: e", b"id: 1"]
LINES += ["data: naïve 🙂".encode(), b"datum: no", b"retry: 5", b'data: {"a": "b:c"}']
STREAMS = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from([b"\n", b"\r\n", b"\r"]))),
).map(lambda stream: stream[0] + b"".join(line + end for line, end in stream[1]))


def decode(*chunks):
    decoder = SSEDecoder()
    return [payload for chunk in chunks for payload in decoder.feed(chunk)]


def reference(stream):
    """The payloads of a whole stream, by the letter of the standard."""
    lines = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode().split("\n")
    events, pending = [], []
    for line in lines[:-1]:
        name, _, value = line.partition(":")
        if not line and pending:
            events.append("\n".join(pending))
            pending = []
        if name == "data":
            pending.append(value.removeprefix(" "))
    return events


@given(STREAMS, st.data())
def test_any_cut_gives_the_payloads_of_the_standard(stream, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert decode(*chunks) == reference(stream)


@given(STREAMS)
def test_byte_by_byte_is_as_good_as_whole(stream):
    assert decode(*(stream[i : i + 1] for i in range(len(stream)))) == decode(stream) == reference(stream)


@given(st.binary())
def test_no_bytes_make_the_decoder_fail(stream):
    decode(stream)


@given(st.lists(st.text().filter(lambda text: "\r" not in text)))
def test_what_is_encoded_is_decoded(payloads):
    assert decode(b"".join(encode(payload.encode()) for payload in payloads)) == payloads


@pytest.mark.parametrize("text", ["", "loading", "two\nlines", "data: not an event"])
def test_a_comment_is_no_event(text):
    assert decode(encode(b"a") + comment(text) + encode(b"b")) == ["a", "b"]


@given(STREAMS, st.data())
def test_any_cut_gives_the_same_comments(stream, data):
    cut = data.draw(st.integers(0, len(stream)))
    comments = []
    decoder = SSEDecoder(comments.append)
    assert [*decoder.feed(stream[:cut]), *decoder.feed(stream[cut:])] == reference(stream)
    lines = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode().split("\n")
    assert comments == [line[1:].removeprefix(" ") for line in lines[:-1] if line.startswith(":")]


def test_an_event_is_complete_with_its_last_byte():
    assert decode(b"data: x\r\n\r") == ["x"]


def test_a_half_event_is_none():
    assert decode(b"data: x\n") == []


def test_a_stream_ends_with_done():
    assert DONE == b"data: [DONE]\n\n"
    assert decode(DONE) == ["[DONE]"]
