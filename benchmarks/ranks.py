"""Servers under measurement whose model is in one process, or divided among ranks on this machine.

Rule 1: ranks get the environment that mlx.launch gives them; with nccl each has a GPU of its own.
Rule 2: every wait has a limit, and every process that was started is gone at the end, with its own child processes.
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
LOG_TAIL = 6000  # bytes
STOP_SECONDS = 10.0  # until a process that has not ended is killed
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Deployment:
    """Deployment of the model: by `size` ranks over a backend, divided by `shard`, with extra environment variables."""

    backend: str
    size: int
    shard: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in a table."""
        if self.size == 1:
            return "one process"
        return " ".join([f"{self.size} ranks", *(f"{name}={value}" for name, value in self.variables.items())])

    def environments(self, directory: Path) -> list[dict[str, str]]:
        """Environment of each rank: what mlx.launch sets, and `variables`. directory: for the host file."""
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
    """Port of a server whose model is loaded. most: sequences that decode together.

    Raises ServerFailed if it ends, or is not ready in time. Every error has the end of the processes' log as a note.
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
            error.add_note(f"Last output of {deployment.name}:\n{tail(log, LOG_TAIL)}")
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
        process_group=0,  # its child processes are ended with it
    )


def _await_ready(processes: Sequence[subprocess.Popen[bytes]], port: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for rank, process in enumerate(processes):
            if process.poll() is not None:
                raise ServerFailed(f"rank {rank} ended with status {process.returncode} at its start")
        with suppress(OSError):  # the port is closed, or 503: the model is not loaded
            urllib.request.urlopen(f"http://{HOST}:{port}/health/ready", timeout=5).close()
            return
        time.sleep(_POLL_SECONDS)
    raise ServerFailed(f"the model was not loaded within {seconds:g} s")


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop all processes; kill those that do not stop."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + STOP_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, until - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
