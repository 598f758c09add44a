"""Makes a real server fail in every way that it promises to survive, and prints what a client saw.

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
TOKENS = 200  # of an answer that a fault is to meet
DISK = 20_000  # bytes that one file may have on the small disk


@dataclass(frozen=True)
class Sequence:
    """What there is to tell of one fault. stream, plain: how a request that it met ended; next: how the one after."""

    fault: str
    stream: str
    plain: str
    next: str


@dataclass(frozen=True)
class Bench:
    """A server with the model "m", and the directory through which faults are asked for."""

    server: RunningServer
    faults: Path

    def ask_for(self, *faults: str) -> None:
        """Have these happen, each once."""
        for fault in faults:
            (self.faults / fault).touch()

    def row(self, name: str, *faults: str) -> Sequence:
        """Let the faults meet a stream that runs, and then a plain request."""
        with self.server.stream("m", "forever", max_tokens=TOKENS) as stream:
            stream.read(5)
            self.ask_for(*faults)
            met = told(list(stream))
        for fault in faults[-1:]:
            self.ask_for(fault)
        return Sequence(name, met, self.plain("forever", max_tokens=TOKENS), self.after())

    def after(self) -> str:
        """How the next request ends; one that is told to come back later does."""
        answer = self.server.chat("m", "hello")
        if "retry-after" not in answer.headers:
            return "answered" if answer.json.get("choices") else str(answer.status)
        time.sleep(int(answer.headers["retry-after"]))
        return f"{answer.status} {answer.error['code']}, after Retry-After {self.plain('hello')}"

    def plain(self, text: str, **parameters: Any) -> str:
        """How a request that does not stream ends."""
        answer = self.server.chat("m", text, **parameters)
        return "answered" if answer.status == 200 else f"{answer.status} {answer.error['code'] or ''}".strip()


def streamed(server: RunningServer, text: str, **parameters: Any) -> str:
    """How a whole request that streams ends."""
    answer = server.chat("m", text, stream=True, **parameters)
    if answer.status != 200:
        return f"{answer.status} {answer.error['code'] or ''}".strip()
    events = [line.removeprefix("data: ") for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    return told([event if event == "[DONE]" else json.loads(event) for event in events[-1:]])


def told(payloads: list[Any]) -> str:
    """How a stream ended."""
    last = payloads[-1] if payloads else {}
    if last == "[DONE]":
        return "answered"
    return f"error event, {last['error']['code'] or last['error']['type']}" if "error" in last else "cut off"


@contextmanager
def bench(directory: Path) -> Iterator[Bench]:
    """A server that fails when it is told to."""
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


def in_the_engine(directory: Path) -> Iterator[Sequence]:
    """Faults of requests, steps and threads, one after the other on one server; at last a step that never ends."""
    with bench(directory) as on:
        yield one_request(on, "a tokenizer that fails on a prompt", "tokenizer")
        yield one_request(on, "a tokenizer whose Rust code panics", "panic")
        yield one_request(on, "a tokenizer that fails within an answer", "detokenizer")
        yield on.row("a step that throws", "step")
        yield on.row("memory runs out in a step", "memory")
        yield on.row("memory runs out twice", "memory", "memory again")
        yield on.row("a thread that dies", "death")
        yield wedged(on)


def one_request(on: Bench, name: str, fault: str) -> Sequence:
    """A fault that meets one request, while another one runs."""
    with on.server.stream("m", "forever", max_tokens=TOKENS) as other:
        other.read(5)
        on.ask_for(fault)
        plain = on.plain("hello")
        on.ask_for(fault)
        first = streamed(on.server, "hello")
        return Sequence(name, f"{first}; others: {told(list(other))}", plain, on.plain("hello"))


def wedged(on: Bench) -> Sequence:
    """A step that never ends: what /health says of it, and that the process ends all the same."""
    with on.server.stream("m", "forever") as stream:
        stream.read(5)
        on.ask_for("wedge")
        eventually(lambda: on.server.get("/health").json["status"] == "degraded")
        ready = on.server.get("/health/ready?model=m").status
        ended = on.server.stop()
        met = told(list(stream))
    return Sequence(
        "a step that never ends, then SIGTERM", met, f"/health/ready {ready}", f"process ended: {ended.status}"
    )


def with_files(directory: Path) -> Iterator[Sequence]:
    """Faults of disks and files."""
    source = write_tiny_gguf(directory / "tiny.gguf")
    yield truncated(directory)
    yield full_disk(directory, source)
    for moment in ("tiny-*.partial", "tiny-*.partial/model/*.safetensors"):
        yield killed(directory / f"cache{len(moment)}", source, moment)


def truncated(directory: Path) -> Sequence:
    """Weights that lack their end."""
    model = scripted_model(directory / "cut", SCRIPTS)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with running_server("--no-defaults", "--model", f"m={model}") as server:
        on = Bench(server, directory)
        met = streamed(server, "hello")
        plain = on.plain("hello")
        weights.write_bytes(whole)
        server.post("/v1/models/unload", {"key": "m"})  # or else the next request would have to wait a second
        return Sequence("a truncated weights file, then repaired", met, plain, on.plain("hello"))


def full_disk(directory: Path, source: Path) -> Sequence:
    """A disk on which a converted model has no place; then one on which it has."""
    cache = {"MLX_SERVER_CACHE": str(directory / "small")}
    with running_server("--no-defaults", "--model", f"m={source}", variables=cache, preexec_fn=limit_files) as server:
        on = Bench(server, directory)
        met = streamed(server, "hello")
        plain = on.plain("hello")
    left = [path.name for path in (directory / "small").iterdir() if not path.name.endswith(".lock")]
    assert not left, left
    with running_server("--no-defaults", "--model", f"m={source}", variables=cache) as server:
        after = Bench(server, directory).plain("hello", max_tokens=3)
    return Sequence("a disk that is full, then more memory", met, plain, after)


def limit_files() -> None:
    """No file of this process, nor of those it starts, may be longer."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))


def killed(cache: Path, source: Path, moment: str) -> Sequence:
    """kill -9 as soon as a file of this name is there, and a new start."""
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
    return Sequence(f"kill -9 when {moment.rpartition('/')[2]} was there, then a start", met, met, after)


def rows() -> Iterator[Sequence]:
    """All faults."""
    for cause in CAUSES:
        with tempfile.TemporaryDirectory() as directory:
            yield from cause(Path(directory))


CAUSES: tuple[Callable[[Path], Iterator[Sequence]], ...] = (in_the_engine, with_files)


def main() -> int:
    """The table. 1: a request after a fault did not work."""
    print("| fault | a stream saw | a plain request saw | the next request |\n| --- | --- | --- | --- |")
    started, failed = time.monotonic(), 0
    for row in rows():
        print(f"| {row.fault} | {row.stream} | {row.plain} | {row.next} |", flush=True)
        failed += not row.next.endswith(("answered", "process ended: 1"))
    print(f"\n{time.monotonic() - started:.0f} s")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
