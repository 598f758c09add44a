"""What a connection may take, over real sockets: time, bytes, and other connections' places."""

import asyncio
import http.client
import json
import logging
import socket
from contextlib import ExitStack

import pytest

from mlxserver.server.logs import TextFormatter
from tools.fuzz import FLAGS, fuzz, write_models
from tools.harness.running_server import DEADLINE, Answer, chat_body, eventually, running_server

HELLO = "Hello there, and hello there again."
CONNECTIONS = 6
PATIENCE = 1.2  # seconds: short, and longer than a busy machine needs to send what it has begun


@pytest.fixture(scope="module")
def server(tmp_path_factory, scripted_path):
    """A server that has little patience."""
    section = f'[models.talker]\nsource = "{scripted_path}"\ncontext_length = 100000000\npreload = true\n'
    limits = (
        f'memory_limit = "100TB"\nheader_timeout = {PATIENCE}\nbody_timeout = {PATIENCE}\nsend_timeout = {PATIENCE}\n'
        f"max_connections = {CONNECTIONS}\nmax_unread_events = 50\n"
    )
    path = tmp_path_factory.mktemp("config") / "models.toml"
    path.write_text(limits + section)
    with running_server("--no-defaults", "--config", str(path), "--log-level", "warning") as server:
        yield server
        ended = server.stop()
        assert (ended.status, ended.stderr) == (0, "")


def connected(server):
    return socket.create_connection(("127.0.0.1", server.port), DEADLINE)


def answer_on(connection):
    """What the server sends on a socket; None if it hangs up."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
    except (http.client.RemoteDisconnected, ConnectionResetError):
        return None
    return Answer(response.status, response.headers, response.read())


def is_idle(server):
    model = server.model("talker")
    return (model["running_requests"], model["queued_requests"]) == (0, 0)


def assert_well(server):
    assert server.chat("talker", "hello").message["content"] == HELLO


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/7.0\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
def test_what_is_no_http_gets_an_error_object(server, garbage):
    with connected(server) as connection:
        connection.sendall(garbage)
        answer = answer_on(connection)
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
        assert answer.headers["content-type"] == "application/json"
        assert connection.recv(1) == b""


def test_a_path_with_a_slash_too_many_is_unknown_and_no_redirect(server):
    for method, path in (("POST", "/v1/chat/completions/"), ("GET", "/health/"), ("GET", "//v1/models")):
        answer = server.ask(method, path)
        assert (answer.status, answer.error["type"]) == (404, "not_found_error")


def test_a_log_has_no_commands_for_terminals():
    fields = {"path": "/\x1b[2J\x7f\u009b", "model": "a b", "id": "x", "none": None}
    record = logging.makeLogRecord({"msg": "request", "fields": fields})
    assert TextFormatter("%(message)s").format(record) == r'request path="/\u001b[2J\u007f\u009b" model="a b" id=x'


def test_head_and_options_show_what_a_path_takes(server):
    head = server.ask("HEAD", "/health")
    assert (head.status, head.body) == (200, b"")
    options = server.ask("OPTIONS", "/v1/chat/completions")
    assert (options.status, options.headers["allow"]) == (204, "POST")
    assert server.ask("OPTIONS", "/nowhere").status == 404


@pytest.mark.parametrize("start", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nHost: x"])
def test_a_head_that_does_not_come_is_408(server, start):
    with connected(server) as connection:
        connection.sendall(start)
        answer = answer_on(connection)
    assert (answer.status, f"{PATIENCE} seconds" in answer.error["message"]) == (408, True)


def test_a_second_head_that_does_not_come_ends_the_connection(server):
    with connected(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer_on(connection).status == 200
        connection.sendall(b"\r\n")
        assert answer_on(connection).status == 408


def test_a_body_that_does_not_come_is_408(server):
    with connected(server) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        answer = answer_on(connection)
        assert (answer.status, f"{PATIENCE} seconds" in answer.error["message"]) == (408, True)
        assert connection.recv(1) == b""


@pytest.mark.parametrize("line", [b"X: " + b"x" * 1000 + b"\r\n", b"x" * 1000, b"\r\n"])
def test_a_head_without_an_end_is_431(server, line):
    with connected(server) as connection:
        if line.strip():
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nY: ")
        try:
            for _ in range(70_000 // len(line) + 1):
                connection.sendall(line)
        except ConnectionError:
            return  # it has hung up already
        answer = answer_on(connection)
    assert answer is None or answer.status == 431


def test_an_answer_does_not_wait_for_a_body_that_is_too_long(server):
    with connected(server) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{")
        assert answer_on(connection).status == 413
        assert connection.recv(1) == b""  # and after a moment the server hangs up


def test_connections_over_the_limit_get_503_and_the_others_are_served(server):
    with ExitStack() as stack:
        stream = stack.enter_context(server.stream("talker", "forever"))
        stream.read(1)
        held = [stack.enter_context(server.stream("talker", "forever")) for _ in range(CONNECTIONS - 1)]
        answer = server.get("/v1/models")
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "overloaded", "1")
        assert all(each.read(2) for each in held)
        assert stream.read(5)
    eventually(lambda: server.get("/health").status == 200)
    eventually(lambda: is_idle(server))


def test_idle_connections_make_room_for_new_ones(server):
    with ExitStack() as stack:
        for _ in range(3 * CONNECTIONS):
            connection = stack.enter_context(connected(server))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer_on(connection).status == 200
    eventually(lambda: server.get("/health").status == 200)


def test_a_reader_that_never_reads_is_dropped_and_its_place_is_free(server):
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps(chat_body("talker", "forever", stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        eventually(lambda: is_idle(server))  # without a byte read
    assert_well(server)


def test_a_reader_that_leaves_its_whole_answer_unread_is_dropped(server):
    tokens = server.post("/tokenize", {"model": "talker", "prompt": HELLO}).json["tokens"]
    body = json.dumps({"model": "talker", "tokens": tokens * 12_000}).encode()
    head = f"POST /detokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(DEADLINE)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(head + body)
            assert connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        eventually(lambda: server.get("/health").status == 200)


def asked_early(text, more):
    """A request for a stream, and what comes before its answer has ended."""
    body = json.dumps(chat_body("talker", text, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body + more


@pytest.mark.parametrize("more", [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x00\x01", b"x" * 70_000])
def test_what_comes_before_the_answer_has_ended_is_not_read(server, more):
    with connected(server) as connection:
        connection.sendall(asked_early("hello", more))
        answer = answer_on(connection)
        assert (answer.status, answer.body.endswith(b"data: [DONE]\n\n")) == (200, True)
        assert connection.recv(1) == b""


def test_a_client_that_has_sent_its_next_request_and_leaves_is_not_answered_on(server):
    with connected(server) as connection:
        connection.sendall(asked_early("forever", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert connection.recv(1)
    eventually(lambda: is_idle(server))


def test_a_trailer_without_an_end_is_431(server):
    with connected(server) as connection:
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(head + b"Expect: 100-continue\r\n\r\n1\r\n{\r\n0\r\nX: ")
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(b"x" * 70_000)
        answer = answer_on(connection)
    assert answer is None or answer.status == 431


def test_some_hostile_requests_hurt_no_other_client(tmp_path):
    hasty = ("--header-timeout", "0.3", "--body-timeout", "0.3")
    with running_server(*FLAGS, *hasty, "--config", str(write_models(tmp_path))) as server:
        report = asyncio.run(fuzz(server.port, 120))
        assert report.count("200")
        assert report.count("400")
        assert not report.faults
        assert all(report.sizes)
        ended = server.stop()
    assert (ended.status, ended.stderr) == (0, "")
