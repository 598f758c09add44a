"""Servers for a measurement whose model is in one process, or shared by ranks on this machine.

Rule 1: ranks are started with what mlx.launch gives them; with nccl each has a GPU of its own.
Rule 2: nothing waits without a limit, and whatever was started is gone at the end, the processes that it started too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.load import HOST
from benchmarks.servers import ROOT, ServerFailed, child_environment, free_port, tail

SETTINGS = """
[models.m]
source = "{directory}"
preload = true
max_running = {most}
prefix_cache_bytes = 0
"""
LAST_WORDS = 6000  # bytes
STOP_SECONDS = 10.0  # until what has not ended is killed
_LOOK_AGAIN = 0.2


@dataclass(frozen=True, slots=True)
class Deployment:
    """How the model is served: by so many ranks over a backend, divided by `shard`, with more variables set."""

    backend: str
    size: int
    shard: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For a table."""
        if self.size == 1:
            return "one process"
        return " ".join([f"{self.size} ranks", *(f"{name}={value}" for name, value in self.variables.items())])

    def environments(self, directory: Path) -> list[dict[str, str]]:
        """What mlx.launch sets for each rank, and `variables`; what it writes to files is put into the directory."""
        if self.size == 1:
            return [{"CUDA_VISIBLE_DEVICES": "0"} if self.backend == "nccl" else {}]
        if self.backend == "nccl":
            shared = {"NCCL_HOST_IP": HOST, "NCCL_PORT": str(free_port()), "MLX_WORLD_SIZE": str(self.size)}
            own = [{"CUDA_VISIBLE_DEVICES": str(rank)} for rank in range(self.size)]
        else:
            hosts = directory / "hosts.json"
            hosts.write_text(json.dumps([[f"{HOST}:{free_port()}"] for _ in range(self.size)]), encoding="utf-8")
            shared, own = {"MLX_HOSTFILE": str(hosts)}, [{} for _ in range(self.size)]
        return [{**shared, **self.variables, **own[rank], "MLX_RANK": str(rank)} for rank in range(self.size)]


@contextmanager
def running(directory: Path, deployment: Deployment, most: int, start_seconds: float) -> Iterator[int]:
    """A server whose model is loaded; its port. most: rows that decode together.

    Raises ServerFailed if it ends, or is not there in time. What the processes said goes with every error as a note.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as log:
        settings = Path(scratch) / "settings.toml"
        text = SETTINGS.format(directory=directory, most=most)
        text += f'shard = "{deployment.shard}"\n' if deployment.size > 1 else ""
        settings.write_text(text, encoding="utf-8")
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for environment in deployment.environments(Path(scratch)):
                processes.append(_start(settings, port, environment, log))
            _await_ready(processes, port, start_seconds)
            yield port
        except BaseException as error:
            error.add_note(f"Last words of {deployment.name}:\n{tail(log, LAST_WORDS)}")
            raise
        finally:
            end(processes)


def _start(settings: Path, port: int, environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    flags = ["--no-defaults", "--log-level", "warning", "--host", HOST, "--port", str(port), "--config", str(settings)]
    return subprocess.Popen(
        [sys.executable, "mlx_api_server.py", *flags],
        cwd=ROOT,
        env={"NCCL_DEBUG": "WARN", **child_environment(), **environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,  # what it starts is ended with it
    )


def _await_ready(processes: Sequence[subprocess.Popen[bytes]], port: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for rank, process in enumerate(processes):
            if process.poll() is not None:
                raise ServerFailed(f"rank {rank} ended with status {process.returncode} at its start")
        with suppress(OSError):  # nobody listens yet, or 503: the model is not loaded
            urllib.request.urlopen(f"http://{HOST}:{port}/health/ready", timeout=5).close()
            return
        time.sleep(_LOOK_AGAIN)
    raise ServerFailed(f"the model was not loaded within {seconds:g} s")


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop the server and the other ranks; kill what does not stop."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + STOP_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, until - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
