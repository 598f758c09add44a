"""Servers as child processes on free ports, which can be stopped for a while so that one is alone on the machine.

Rule 1: all get the same weights and their own default settings; those with MLX on a Linux CPU the same BLAS library.
Rule 2: a server's output is shown if it fails, and only then.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.load import HOST
from benchmarks.machine import OPENBLAS, needs_openblas

ROOT = Path(__file__).parent.parent
OURS, MLX_LM, LLAMA, VLLM_MLX, RAPID_MLX = "ours", "mlx_lm.server", "llama-server", "vllm-mlx", "Rapid-MLX"
# Roles of models in scenarios. A server without a role is left out of the scenarios that need it.
FIRST, SECOND, GGUF, EMBEDDING = "first", "second", "gguf", "embedding"
PROGRAMS = {LLAMA: "llama-server", VLLM_MLX: "vllm-mlx", RAPID_MLX: "rapid-mlx"}
SLOT_TOKENS = 2048  # of a sequence in llama-server, which reserves them at its start
# mlx_lm.server listens with a backlog of 5: a burst of connections would wait for TCP's retry after a second, and the
# figures would be those of the retry, not of the engine.
CONNECT_INTERVALS = {MLX_LM: 0.002}  # seconds between two connections
START_TIMEOUT = 300.0
STOP_TIMEOUT = 30.0
LOG_TAIL = 4000


class ServerFailed(Exception):
    """A server did not start, or ended early; its last output is in the message or in a note."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Models of a run. pair: two directories of the same weights. gguf: a file. clients: the most at once.

    gguf_source: what our server calls that file.
    """

    pair: tuple[Path, Path]
    clients: int
    gguf: Path | None = None
    gguf_source: str = "embedded:smollm2"
    embedding: str | None = "embedded:minilm"


@dataclass(frozen=True, slots=True)
class Server:
    """Running server. models: the names for requests, by role."""

    name: str
    port: int
    models: Mapping[str, str]
    process: subprocess.Popen[bytes]

    @property
    def connect_interval(self) -> float:
        """Least seconds between two connections; 0 for a server that takes many at once."""
        return CONNECT_INTERVALS.get(self.name, 0.0)

    def peak_memory(self) -> int | None:
        """Peak of resident memory in bytes; None where the system does not report it."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return None
        lines = status.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)

    def pause(self) -> None:
        """Take the processor from the server."""
        pause(self.process)

    def resume(self) -> None:
        """Let the server run. Raises ServerFailed if it has ended."""
        if self.process.poll() is not None:
            raise ServerFailed(f"{self.name} ended with status {self.process.returncode}")
        resume(self.process)


def pause(process: subprocess.Popen[bytes]) -> None:
    """Stop a process that leads its group, and all of the group, until resume()."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGSTOP)


def resume(process: subprocess.Popen[bytes]) -> None:
    """Let a group of processes go on."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGCONT)


def find_program(name: str) -> str | None:
    """The program of a server that is not part of this environment: by a variable, or on the PATH; None without one.

    The variable of `llama-server` is LLAMA_SERVER, and so on.
    """
    program = PROGRAMS[name]
    return os.environ.get(program.upper().replace("-", "_")) or shutil.which(program)


def available() -> list[str]:
    """The servers that can be measured on this machine."""
    return [OURS, MLX_LM, *(name for name in PROGRAMS if find_program(name))]


@contextmanager
def running(name: str, weights: Weights) -> Iterator[Server]:
    """Start a server, and stop it at the end. Raises ServerFailed if it does not start."""
    port = free_port()
    models, command = COMMANDS[name](weights, port)
    with tempfile.TemporaryFile() as log:
        environment = child_environment(preload=name in (MLX_LM, VLLM_MLX, RAPID_MLX))
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_up(name, process, port, log)
            yield Server(name, port, models, process)
        except Exception as error:
            error.add_note(f"Last output of {name}:\n{tail(log)}")
            raise
        finally:
            stop(process)


Command = tuple[Mapping[str, str], list[str]]


def _our_command(weights: Weights, port: int) -> Command:
    sources = {FIRST: str(weights.pair[0]), SECOND: str(weights.pair[1])}
    sources |= {GGUF: weights.gguf_source} if weights.gguf else {}
    sources |= {EMBEDDING: weights.embedding} if weights.embedding else {}
    models = [flag for key, source in sources.items() for flag in ("--model", f"{key}={source}")]
    # Prompts are the same in each run: they must not be found on disk.
    flags = ["--no-defaults", "--log-level", "warning", "--prefix-cache-disk-bytes", "0"]
    command = [sys.executable, "mlx_api_server.py", "--host", HOST, "--port", str(port), *flags, *models]
    return {key: key for key in sources}, command


def _mlx_lm_command(weights: Weights, port: int) -> Command:
    first, second = map(str, weights.pair)
    flags = ["--host", HOST, "--port", str(port), "--model", first, "--log-level", "WARNING"]
    return {FIRST: first, SECOND: second}, [sys.executable, "-m", "mlx_lm", "server", *flags]


def _llama_command(weights: Weights, port: int) -> Command:
    slots = ["--parallel", str(weights.clients), "--ctx-size", str(weights.clients * SLOT_TOKENS)]
    flags = ["--model", str(weights.gguf), "--host", HOST, "--port", str(port), *slots, "--offline"]
    return {GGUF: GGUF}, [str(find_program(LLAMA)), *flags]


def _serve_command(name: str, *flags: str) -> Callable[[Weights, int], Command]:
    def command(weights: Weights, port: int) -> Command:
        first = str(weights.pair[0])
        return {FIRST: first}, [str(find_program(name)), "serve", first, "--host", HOST, "--port", str(port), *flags]

    return command


COMMANDS: Mapping[str, Callable[[Weights, int], Command]] = {
    OURS: _our_command,
    MLX_LM: _mlx_lm_command,
    LLAMA: _llama_command,
    VLLM_MLX: _serve_command(VLLM_MLX, "--continuous-batching"),
    RAPID_MLX: _serve_command(RAPID_MLX),
}


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


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its group, which may be stopped."""
    resume(process)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
