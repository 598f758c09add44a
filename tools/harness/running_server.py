"""Running server: a separate process on a free port, reached over real sockets."""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
GREETING = "Serving on http://"
DEFAULT_LIMIT = "MLX_SERVER_DEFAULT_MAX_TOKENS"
DEADLINE = 100.0  # seconds after which anything counts as hung, on a busy machine too


def eventually(condition, deadline=DEADLINE):
    """Wait until condition() is true; its result."""
    end = time.monotonic() + deadline
    while not (outcome := condition()):
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)
    return outcome


@dataclass(frozen=True)
class Ended:
    """End of a process."""

    status: int
    stderr: str


@dataclass(frozen=True)
class Answer:
    """Whole HTTP answer."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """The error object, which has exactly OpenAI's four fields."""
        assert self.json.keys() == {"error"}
        assert self.json["error"].keys() == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def message(self):
        return self.json["choices"][0]["message"]


def server_environment():
    """The environment of this process without settings of the server, with the allocator of `make serve`.

    No prefixes are kept on disk, and no policies measured: what one run has found, the next one would use. The models
    of this machine's user are not offered. An answer whose request states no limit goes to the end of its context.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLX_SERVER_")}
    own = {"PYTHONMALLOC": "malloc", "MLX_SERVER_PREFIX_CACHE_DISK_BYTES": "0", "MLX_SERVER_LIBRARY": "false"}
    own |= {"MLX_SERVER_MEASURE_POLICIES": "false", DEFAULT_LIMIT: "0"}
    return own | kept


def start_server(*flags, script="mlx_api_server.py", variables=None, **options):
    """Start a server; its process, and the file of its stderr. variables: None for one that is not set. options: of
    Popen.
    """
    # The process and its reader share one place in the file; what is appended goes to the end wherever that is.
    stderr = tempfile.TemporaryFile("a+")  # noqa: SIM115  (it lives as long as the process)
    environment = server_environment() | (variables or {})
    process = subprocess.Popen(
        [sys.executable, script, *flags],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        **options,
    )
    return process, stderr


def run_server(*flags):
    """Run a server that fails at its start; its end."""
    process, stderr = start_server(*flags)
    with process.stdout, stderr:
        return _ended(process, stderr)


@contextmanager
def running_server(*flags, **options):
    """A server that is ready; killed at the end if it was not stopped. options: of start_server()."""
    process, stderr = start_server("--port", "0", *flags, **options)
    hung = threading.Timer(DEADLINE, process.kill)
    hung.start()
    try:
        line = next((line for line in process.stdout if line.startswith(GREETING)), None)
        hung.cancel()
        assert line, f"the server did not start:\n{_ended(process, stderr).stderr}"
        yield RunningServer(process, stderr, line.removeprefix("Serving on ").strip())
    finally:
        hung.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
        stderr.close()


@dataclass
class RunningServer:
    process: subprocess.Popen
    stderr: Any
    url: str

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)

    def ask(self, method, path, body=None, headers=None):
        """Send one request on its own connection. A body that is an iterator is sent in chunks."""
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path):
        return self.ask("GET", path)

    def post(self, path, body):
        return self.ask("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())

    def chat(self, model, text, **parameters):
        return self.post("/v1/chat/completions", chat_body(model, text, **parameters))

    def stream(self, model, text, **parameters):
        return ChatStream(self.connect(), chat_body(model, text, stream=True, **parameters))

    def model(self, key):
        """The object of GET /v1/models/{key}."""
        return self.get(f"/v1/models/{key}").json

    def status(self, key):
        return self.model(key)["status"]["value"]

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return _ended(self.process, self.stderr)


def _ended(process, stderr):
    try:
        status = process.wait(DEADLINE)
    finally:
        process.kill()
    stderr.seek(0)
    return Ended(status, stderr.read())


def chat_body(model, text, **parameters):
    return {"model": model, "messages": [{"role": "user", "content": text}], **parameters}


@dataclass
class ChatStream:
    """Streamed answer, read event by event. The end of its `with` block hangs up."""

    connection: http.client.HTTPConnection
    body: dict
    payloads: list = field(default_factory=list)

    def __enter__(self):
        self.connection.request("POST", "/v1/chat/completions", json.dumps(self.body))
        self.response = self.connection.getresponse()
        assert self.response.status == 200, self.response.read()
        assert self.response.headers["content-type"].startswith("text/event-stream")
        return self

    def __exit__(self, *_):
        self.response.close()
        self.connection.close()

    def __iter__(self):
        """The payloads of the events: chunks as dicts, and "[DONE]"."""
        while line := self.response.readline():
            if line.startswith(b"data: "):
                payload = line.removeprefix(b"data: ").strip().decode()
                yield payload if payload == "[DONE]" else json.loads(payload)

    def read(self, count):
        """The next `count` payloads."""
        return [payload for payload, _ in zip(self, range(count), strict=False)]
