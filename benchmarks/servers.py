"""Both servers as child processes on free ports.

Rule 1: both get the same model directories, the same BLAS library and their own default settings.
Rule 2: a server's output is shown if it fails, and only then.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.load import HOST
from benchmarks.machine import OPENBLAS, needs_openblas

ROOT = Path(__file__).parent.parent
OURS = "ours"
MLX_LM = "mlx_lm.server"
START_TIMEOUT = 300.0
STOP_TIMEOUT = 30.0
LOG_TAIL = 4000


class ServerFailed(Exception):
    """A server did not start, or ended early; its last output is in the message or in a note."""


@dataclass(frozen=True, slots=True)
class Server:
    """Running server. models: the names for requests, one per directory."""

    name: str
    port: int
    models: tuple[str, ...]
    process: subprocess.Popen[bytes]

    def peak_memory(self) -> int | None:
        """Peak of resident memory in bytes; None where the system does not report it."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return None
        lines = status.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


@contextmanager
def running(name: str, directories: Sequence[Path]) -> Iterator[Server]:
    """Start a server (OURS or MLX_LM) for the directories, and stop it at the end.

    Raises ServerFailed if it does not start, or has ended before.
    """
    port = free_port()
    names, command = (_our_command if name == OURS else _mlx_lm_command)(directories, port)
    with tempfile.TemporaryFile() as log:
        environment = child_environment(preload=name == MLX_LM)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_up(name, process, port, log)
            yield Server(name, port, names, process)
            if process.poll() is not None:
                raise ServerFailed(f"{name} ended with status {process.returncode}:\n{tail(log)}")
        except Exception as error:
            error.add_note(f"Last output of {name}:\n{tail(log)}")
            raise
        finally:
            _stop(process)


def _our_command(directories: Sequence[Path], port: int) -> tuple[tuple[str, ...], list[str]]:
    keys = tuple("abcdefgh"[: len(directories)])
    models = [flag for key, path in zip(keys, directories, strict=True) for flag in ("--model", f"{key}={path}")]
    flags = ["--no-defaults", "--log-level", "warning"]
    return keys, [sys.executable, "mlx_api_server.py", "--host", HOST, "--port", str(port), *flags, *models]


def _mlx_lm_command(directories: Sequence[Path], port: int) -> tuple[tuple[str, ...], list[str]]:
    names = tuple(str(path) for path in directories)
    flags = ["--host", HOST, "--port", str(port), "--model", names[0], "--log-level", "WARNING"]
    return names, [sys.executable, "-m", "mlx_lm", "server", *flags]


def child_environment(*, preload: bool = False) -> dict[str, str]:
    """Environment of a process with MLX, without network. preload: on a Linux CPU, the BLAS library that ours loads."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if preload and needs_openblas():
        environment["LD_PRELOAD"] = OPENBLAS
    return environment


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_up(name: str, process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"{name} ended with status {process.returncode} at its start")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise ServerFailed(f"{name} did not answer GET /health within {START_TIMEOUT:.0f} s")


def tail(log: IO[bytes], most: int = LOG_TAIL) -> str:
    """The end of a log, at most `most` bytes."""
    end = log.seek(0, os.SEEK_END)
    log.seek(max(0, end - most))
    return log.read().decode(errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
