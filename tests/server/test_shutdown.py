"""How a server ends: what runs finishes, what is new is refused, a second signal ends it at once."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from mlxserver.server.request_log import RequestLog
from mlxserver.server.uvicorn_server import Interruptible
from tests.support.requests import send_plain
from tests.support.scripted_engine import within_deadline
from tools.harness.running_server import DEADLINE, ROOT, eventually, running_server, server_environment


@pytest.fixture(scope="module")
def flags(tmp_path_factory, scripted_path):
    path = tmp_path_factory.mktemp("config") / "models.toml"
    section = f'[models.talker]\nsource = "{scripted_path}"\ncontext_length = 100000000\n'
    path.write_text(f'memory_limit = "100TB"\n{section}')
    return ("--no-defaults", "--config", str(path), "--log-level", "warning")


def is_refusing(server):
    answer = server.get("/v1/models")
    return answer.status == 503 and answer


def test_while_it_drains_new_requests_are_refused_and_running_ones_go_on(flags):
    with running_server(*flags) as server:
        with server.stream("talker", "forever") as stream:
            stream.read(3)
            server.process.send_signal(signal.SIGTERM)
            answer = eventually(lambda: is_refusing(server))
            assert (answer.error["code"], answer.headers["connection"]) == ("stopping", "close")
            assert int(answer.headers["retry-after"]) >= 1
            assert server.get("/health").status == 200
            assert len(stream.read(20)) == 20
        assert server.process.wait(DEADLINE) == 0  # the last request has gone


def test_what_does_not_finish_in_time_gets_the_error_that_the_server_stops(flags):
    with running_server(*flags, "--shutdown-timeout", "0.2") as server, server.stream("talker", "forever") as stream:
        stream.read(3)
        plain = send_plain(server, "talker", "forever")
        eventually(lambda: server.model("talker")["running_requests"] == 2)
        ended = []
        ending = threading.Thread(target=lambda: ended.append(server.stop()))
        ending.start()
        *_, last = stream
        answer = plain.getresponse()
        body = answer.read().decode()
        plain.close()
        ending.join(DEADLINE)
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "model_unloading")
    assert (answer.status, "unloaded" in body, bool(answer.headers["retry-after"])) == (503, True, True)
    assert (ended[0].status, ended[0].stderr) == (0, "")


@pytest.mark.parametrize("has_headers", [False, True])
@within_deadline
async def test_a_request_that_is_cancelled_at_last_gets_503_unless_its_response_has_begun(has_headers, caplog):
    sent, begun = [], asyncio.Event()

    async def endless(scope, receive, send):
        if has_headers:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        begun.set()
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/slow", "headers": []}
    caplog.set_level("INFO", "requests")
    serving = asyncio.create_task(RequestLog(Interruptible(endless))(scope, None, send))
    await begun.wait()
    serving.cancel()
    await serving
    status = 200 if has_headers else 503
    assert [message["status"] for message in sent if message["type"] == "http.response.start"] == [status]
    assert [record.fields["status"] for record in caplog.records] == [status]
    assert [json.loads(m["body"])["error"]["code"] for m in sent if "body" in m] == (
        [] if has_headers else ["stopping"]
    )


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(flags, second):
    with running_server(*flags) as server, server.stream("talker", "forever") as stream:
        stream.read(3)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: is_refusing(server))
        server.process.send_signal(second)
        assert server.process.wait(DEADLINE) == -second


COMMAND = "import sys; sys.argv[0] = '/bin/mlx-server'; from mlx_api_server import main; sys.exit(main())"


@pytest.mark.parametrize("module", ["uvloop", "mlx_lm"])
@pytest.mark.parametrize("program", [["mlx_api_server.py"], ["-c", COMMAND]], ids=["from a clone", "installed"])
def test_an_interruption_while_it_starts_has_no_traceback(module, program):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *program, "--no-defaults", "--port", "0"],
        cwd=ROOT,
        env=server_environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output = ""
        for line in process.stderr:
            output += line
            if line.rstrip().endswith(f"| {module}") or f" {module}" in line.rsplit("|", 1)[-1]:
                os.kill(process.pid, signal.SIGINT)
                break
        output += process.stderr.read()
        assert process.wait(DEADLINE) == -signal.SIGINT
        assert "Traceback" not in output
    finally:
        process.kill()
        process.stderr.close()
