"""Clients that close half of their connection, all of it, or none for long, over real sockets."""

import json
import re
import socket
from contextlib import closing, contextmanager

import pytest

from tests.support.scripts import SCRIPTS
from tools.harness.running_server import DEADLINE, chat_body, eventually, running_server


@pytest.fixture(scope="module")
def config(tmp_path_factory, scripted_path):
    path = tmp_path_factory.mktemp("config") / "models.toml"
    path.write_text(
        'memory_limit = "100TB"\nidle_connection_timeout = 1\nheartbeat_interval = 0\n'
        f'[models.narrow]\nsource = "{scripted_path}"\ntype = "instruction"\ncontext_length = 100000000\n'
        "preload = true\nmax_running = 1\n"
    )
    return path


@pytest.fixture(scope="module")
def server(config):
    """A server of one model with one slot, which sends no heartbeats by itself."""
    with running_server("--no-defaults", "--config", str(config), "--log-level", "warning") as server:
        yield server
        ended = server.stop()
        assert (ended.status, ended.stderr) == (0, "")


@contextmanager
def asked(server, text, stream, version="1.1", method="POST", path="/v1/chat/completions"):
    """A connection on which a request was sent."""
    body = json.dumps(chat_body("narrow", text, stream=stream)).encode() if method == "POST" else b""
    head = f"{method} {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", server.port), DEADLINE)) as connection:
        connection.sendall(head.encode() + body)
        yield connection


@contextmanager
def occupied(server):
    """Its slot is taken until stop() is called."""
    with server.stream("narrow", "forever") as stream:
        stream.read(2)
        yield stream


def requests(server):
    model = server.model("narrow")
    return model["running_requests"] + model["queued_requests"]


def rest(connection):
    """All that comes until the server closes the connection."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    return received


def responses(received):
    """Status lines of all responses, interim ones included, and the last head and body."""
    heads = re.findall(rb"HTTP/1.1 \d+ [^\r]*", received)
    head, _, body = received[received.rindex(heads[-1]) :].partition(b"\r\n\r\n")
    return [line.decode() for line in heads], head.decode().lower(), body


def test_a_half_closed_connection_gets_a_whole_answer(server):
    with occupied(server) as stream, asked(server, "hello", stream=False) as connection:
        connection.shutdown(socket.SHUT_WR)
        interim = connection.recv(1000)  # the answer waits for the slot
        assert interim.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert requests(server) == 2
        stream.__exit__()
        lines, head, body = responses(interim + rest(connection))
    assert set(lines[:-1]) == {"HTTP/1.1 100 Continue"}
    assert lines[-1] == "HTTP/1.1 200 OK"
    assert "connection: close" in head and "keep-alive:" not in head
    assert json.loads(body)["choices"][0]["message"]["content"] == SCRIPTS["hello"]


def test_a_half_closed_connection_gets_a_whole_stream(server):
    with occupied(server) as stream, asked(server, "hello", stream=True) as connection:
        connection.shutdown(socket.SHUT_WR)
        received = connection.recv(1000)
        while b": queue" not in received:  # a heartbeat, to find out whether the client is there
            received += connection.recv(1000)
        stream.__exit__()
        received += rest(connection)
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_half_closed_connection_gets_what_needs_no_model(server):
    with asked(server, "", stream=False, method="GET", path="/health") as connection:
        connection.shutdown(socket.SHUT_WR)
        lines, _, body = responses(rest(connection))
    assert (lines[-1], json.loads(body)["status"]) == ("HTTP/1.1 200 OK", "ok")


@pytest.mark.parametrize("half_first", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_client_is_gone_is_cancelled(server, stream, half_first):
    with asked(server, "forever", stream) as connection:
        eventually(lambda: requests(server) == 1)
        if half_first:
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(10)
    eventually(lambda: requests(server) == 0)


@pytest.mark.parametrize("half_first", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waits_is_cancelled_once_its_client_is_gone(server, stream, half_first):
    with occupied(server):
        with asked(server, "forever", stream) as connection:
            if stream:
                assert connection.recv(1000)  # the headers
            eventually(lambda: requests(server) == 2)
            if half_first:
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(10)
        eventually(lambda: requests(server) == 1)
    eventually(lambda: requests(server) == 0)


def test_a_client_of_http_1_0_that_closes_half_is_gone(server):
    with asked(server, "forever", stream=False, version="1.0") as connection:
        eventually(lambda: requests(server) == 1)
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b""
    eventually(lambda: requests(server) == 0)


def test_half_a_request_gets_no_answer(server):
    with closing(socket.create_connection(("127.0.0.1", server.port), DEADLINE)) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b""


def test_an_idle_connection_is_closed_after_the_time_that_its_responses_state(server):
    with asked(server, "hello", stream=False) as connection:
        lines, head, _ = responses(rest(connection))
    assert lines == ["HTTP/1.1 200 OK"]
    assert "keep-alive: timeout=1" in head.split("\r\n")


@pytest.mark.parametrize("headers", [{"Connection": "close"}, {}])
def test_only_connections_that_stay_open_state_a_time(server, headers):
    answer = server.ask("GET", "/health", headers=headers)
    assert answer.headers["keep-alive"] == (None if headers else "timeout=1")


def test_heartbeats_of_a_stream_begin_with_a_reload_of_their_interval(server, config):
    settings = config.read_text()
    config.write_text(settings.replace("heartbeat_interval = 0", "heartbeat_interval = 0.05"))
    try:
        assert server.post("/v1/models/reload", {}).status == 200
        with occupied(server), asked(server, "hello", stream=True) as connection:
            received = b""
            while received.count(b': queue {"position":1}\n\n') < 3:
                received += connection.recv(1000)
    finally:
        config.write_text(settings)
        assert server.post("/v1/models/reload", {}).status == 200
    eventually(lambda: requests(server) == 0)
