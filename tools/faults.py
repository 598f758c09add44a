"""Fault injection: makes a real server fail in every way that it must survive, and prints what clients received.

Run: python -m tools.faults. Exit status 1 if a request after a fault did not work.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.harness.models import scripted_model
from tools.harness.running_server import RunningServer, eventually, running_server
from tools.harness.scripts import Script
from tools.harness.tiny_gguf import write_tiny_gguf

ANSWER = "Hello there, and hello there again."
SCRIPTS: dict[str, Script | str] = {"hello": ANSWER, "forever": Script(["tick ", "tock "], endless=True)}
TOKENS = 200  # of an answer within which a fault happens
MORE = 20  # events by which a stream shows that it goes on
DISK = 20_000  # bytes per file on the small disk


@dataclass(frozen=True)
class Row:
    """Row of the table. stream, plain: the end of a request during the fault; next: the end of the one after it."""

    fault: str
    stream: str
    plain: str
    next: str


@dataclass(frozen=True)
class Bench:
    """Server with the model "m", and the directory by which faults are requested."""

    server: RunningServer
    faults: Path

    def ask_for(self, *faults: str) -> None:
        """Make these faults happen, each once."""
        for fault in faults:
            (self.faults / fault).touch()

    def row(self, name: str, *faults: str) -> Row:
        """Make the faults happen within a stream, and the last one again within a plain request."""
        self.ask_for(*faults)
        with self.server.stream("m", "forever", max_tokens=TOKENS) as stream:
            met = stream_end(list(stream))
        for fault in faults[-1:]:
            self.ask_for(fault)
        return Row(name, met, self.plain("forever", max_tokens=TOKENS), self.after())

    def after(self) -> str:
        """The end of the next request, and of its retry if Retry-After asks for one."""
        answer = self.server.chat("m", "hello")
        if "retry-after" not in answer.headers:
            return "answered" if answer.json.get("choices") else str(answer.status)
        time.sleep(int(answer.headers["retry-after"]))
        return f"{answer.status} {answer.error['code']}, after Retry-After {self.plain('hello')}"

    def plain(self, text: str, **parameters: Any) -> str:
        """The end of a request without streaming."""
        answer = self.server.chat("m", text, **parameters)
        return "answered" if answer.status == 200 else f"{answer.status} {answer.error['code'] or ''}".strip()


def streamed(server: RunningServer, text: str, **parameters: Any) -> str:
    """The end of a streamed request."""
    answer = server.chat("m", text, stream=True, **parameters)
    if answer.status != 200:
        return f"{answer.status} {answer.error['code'] or ''}".strip()
    events = [line.removeprefix("data: ") for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    return stream_end([event if event == "[DONE]" else json.loads(event) for event in events[-1:]])


def stream_end(payloads: list[Any]) -> str:
    """The end of a stream, by its last payload."""
    last = payloads[-1] if payloads else {}
    if last == "[DONE]":
        return "answered"
    return f"error event, {last['error']['code'] or last['error']['type']}" if "error" in last else "cut off"


@contextmanager
def bench(directory: Path) -> Iterator[Bench]:
    """A server that fails on request."""
    faults = directory / "faults"
    faults.mkdir()
    model = scripted_model(directory / "scripted", SCRIPTS)
    with running_server(
        *("--no-defaults", "--model", f"m={model}", "--shutdown-timeout", "0.5", "--wedged-after", "1"),
        script="tests/support/faulty_server.py",
        variables={"FAULTS": str(faults)},
    ) as server:
        server.chat("m", "hello")
        yield Bench(server, faults)


def in_the_engine(directory: Path) -> Iterator[Row]:
    """Faults of requests, steps and threads, one after the other on one server; a step that never ends as the last."""
    with bench(directory) as on:
        yield one_request(on, "a tokenizer that fails on a prompt", "tokenizer")
        yield one_request(on, "a tokenizer whose Rust code panics", "panic")
        yield one_request(on, "a tokenizer that fails within an answer", "detokenizer")
        yield on.row("a step that throws", "step")
        yield on.row("memory runs out in a step", "memory")
        yield on.row("memory runs out twice", "memory", "memory again")
        yield on.row("a thread that dies", "death")
        yield wedged(on)


def one_request(on: Bench, name: str, fault: str) -> Row:
    """A fault of one request, while another one runs, whose stream goes on."""
    with on.server.stream("m", "forever") as other:
        other.read(5)
        on.ask_for(fault)
        plain = on.plain("hello")
        on.ask_for(fault)
        first = streamed(on.server, "hello")
        after = on.plain("hello")
        others = "going on" if all("choices" in event for event in other.read(MORE)) else "ended"
    eventually(lambda: not on.server.model("m")["running_requests"])  # the next fault is for another one
    return Row(name, f"{first}; others: {others}", plain, after)


def wedged(on: Bench) -> Row:
    """A step that never ends: the server's health, and the end of the process."""
    with on.server.stream("m", "forever") as stream:
        stream.read(5)
        on.ask_for("wedge")
        eventually(lambda: on.server.get("/health").json["status"] == "degraded")
        ready = on.server.get("/health/ready?model=m").status
        ended = on.server.stop()
        met = stream_end(list(stream))
    return Row("a step that never ends, then SIGTERM", met, f"/health/ready {ready}", f"process ended: {ended.status}")


def with_files(directory: Path) -> Iterator[Row]:
    """Faults of disks and files."""
    source = write_tiny_gguf(directory / "tiny.gguf")
    yield truncated(directory)
    yield full_disk(directory, source)
    for moment in ("tiny-*.partial", "tiny-*.partial/model/*.safetensors"):
        yield killed(directory / f"cache{len(moment)}", source, moment)


def truncated(directory: Path) -> Row:
    """A truncated weights file."""
    model = scripted_model(directory / "cut", SCRIPTS)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with running_server("--no-defaults", "--model", f"m={model}") as server:
        on = Bench(server, directory)
        met = streamed(server, "hello")
        plain = on.plain("hello")
        weights.write_bytes(whole)
        server.post("/v1/models/unload", {"key": "m"})  # otherwise the next request gets a Retry-After
        return Row("a truncated weights file, then repaired", met, plain, on.plain("hello"))


def full_disk(directory: Path, source: Path) -> Row:
    """A disk too small for a converted model, then a larger one."""
    cache = {"MLX_SERVER_CACHE": str(directory / "small")}
    with running_server("--no-defaults", "--model", f"m={source}", variables=cache, preexec_fn=limit_files) as server:
        on = Bench(server, directory)
        met = streamed(server, "hello")
        plain = on.plain("hello")
    left = [path.name for path in (directory / "small").iterdir() if not path.name.endswith(".lock")]
    assert not left, left
    with running_server("--no-defaults", "--model", f"m={source}", variables=cache) as server:
        after = Bench(server, directory).plain("hello", max_tokens=3)
    return Row("a disk that is full, then more memory", met, plain, after)


def limit_files() -> None:
    """Limit the size of files that this process and its children write."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))


def killed(cache: Path, source: Path, moment: str) -> Row:
    """kill -9 as soon as a file of this name exists, then a new start."""
    flags = ("--no-defaults", "--model", f"m={source}")
    with running_server(*flags, variables={"MLX_SERVER_CACHE": str(cache)}) as server:
        connection = server.connect()
        connection.request("POST", "/v1/models/load", f'{{"model": "{source}", "key": "m"}}')
        eventually(lambda: list(cache.glob(moment)))
        server.process.kill()
        try:
            met = str(connection.getresponse().status)
        except OSError:
            met = "connection lost"
    with running_server(*flags, variables={"MLX_SERVER_CACHE": str(cache)}) as server:
        after = Bench(server, cache).plain("hello", max_tokens=3)
    assert not list(cache.glob("*.partial"))
    return Row(f"kill -9 when {moment.rpartition('/')[2]} was there, then a start", met, met, after)


def rows() -> Iterator[Row]:
    """The rows of all faults."""
    for cause in CAUSES:
        with tempfile.TemporaryDirectory() as directory:
            yield from cause(Path(directory))


CAUSES: tuple[Callable[[Path], Iterator[Row]], ...] = (in_the_engine, with_files)


def main() -> int:
    """Print the table. Returns 1 if a request after a fault did not work."""
    print("| fault | a stream received | a plain request received | the next request |\n| --- | --- | --- | --- |")
    started, failed = time.monotonic(), 0
    for row in rows():
        print(f"| {row.fault} | {row.stream} | {row.plain} | {row.next} |", flush=True)
        failed += not row.next.endswith(("answered", "process ended: 1"))
    print(f"\n{time.monotonic() - started:.0f} s")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
