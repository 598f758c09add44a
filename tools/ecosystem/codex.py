"""Codex, which speaks responses alone: a task of three calls, also beside a stream; too long a prompt; Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.ecosystem.agents import CONTEXT, DONE, REQUEST, TIMEOUT, Agent
from tools.harness.agents import TASK, agent_model, call, say
from tools.harness.scripts import Script

SMALL, ENDLESS, OTHER = "for-codex-small", "for-codex-endless", "smollm2"
SMALL_CONTEXT = 4096
NO_ROOM = "ran out of room in the model's context window"
CONFIG = """\
model = "{model}"
model_provider = "local"
model_context_window = 200000
approval_policy = "never"
sandbox_mode = "danger-full-access"

[model_providers.local]
name = "local"
base_url = "{url}"
wire_api = "responses"
"""
RUN = ("codex", "exec", "--skip-git-repo-check")


class Codex(Agent):
    """Codex with models of its own: one that does the task, one of a small context, one that never ends."""

    def write_model(self, directory: Path) -> str:
        """Write its models; returns their sections of the configuration."""
        small = agent_model(directory / SMALL, [say("Never.")], context=SMALL_CONTEXT)
        endless = Script(["Hm.", "\n</think>\n\n", "tick ", "tock "], endless=True)
        forever = agent_model(directory / ENDLESS, [endless], context=CONTEXT)
        return (
            f"{super().write_model(directory)}"
            f'[models.{SMALL}]\nsource = "{small}"\n'
            f'[models.{ENDLESS}]\nsource = "{forever}"\ncontext_length = {CONTEXT}\n'
        )

    def try_out(self, directory: Path, url: str) -> str:
        """Install Codex into a directory and run it; one line on what it did.

        Raises:
            CalledProcessError, TimeoutExpired: it failed.
            ValueError: the file is missing or has another text, or what Codex told is not what happened.
        """
        told = [super().try_out(directory, url)]
        with running_stream(url):
            super().try_out(directory, url)
            told.append("again beside a stream")
        with self.prepared(directory, url) as (work, environment):
            self._check_too_long(work, environment)
            told.append("found the context too small")
            self._check_interrupt(url, work, environment)
            told.append("freed its slot at Ctrl-C")
        return ", ".join(told)

    def _check_too_long(self, work: Path, environment: dict[str, str]) -> None:
        done = _codex(SMALL, work, environment)
        output, _ = done.communicate(timeout=TIMEOUT)
        if done.returncode == 0 or NO_ROOM not in output:
            raise ValueError(f"too long a prompt: status {done.returncode}, {output}")

    def _check_interrupt(self, url: str, work: Path, environment: dict[str, str]) -> None:
        running = _codex(ENDLESS, work, environment)
        wait_for_requests(url, ENDLESS, 1)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=TIMEOUT)
        wait_for_requests(url, ENDLESS, 0)


def _codex(model: str, work: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command: Sequence[str] = (*RUN, "-m", model, REQUEST)
    return subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_requests(url: str, model: str, count: int) -> None:
    """Return once a model has so many running requests. Raises ValueError."""
    deadline = time.monotonic() + TIMEOUT
    while (card := _get(f"{url}/v1/models/{model}"))["running_requests"] != count:
        if time.monotonic() > deadline:
            raise ValueError(f"expected {count} running requests: {card}")
        time.sleep(0.1)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return json.load(answer)


@contextmanager
def running_stream(url: str) -> Iterator[None]:
    """A stream of another model, which has to go on until the end of the block. Raises ValueError."""
    body = {"model": OTHER, "messages": [{"role": "user", "content": "Count."}], "stream": True, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body | {"max_tokens": 8000}).encode())
    lines: list[bytes] = []
    is_over = threading.Event()
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:

        def read() -> None:
            for line in answer:
                lines.append(line)
                if is_over.is_set():
                    return

        reader = threading.Thread(target=read)
        reader.start()
        yield
        count = len(lines)
        is_over.set()
        reader.join(TIMEOUT)
    if len(lines) <= count or b"[DONE]" in b"".join(lines):
        raise ValueError("the stream of the other model did not go on beside it")


CODEX = Codex(
    "codex",
    "@openai/codex",
    (*RUN, REQUEST),
    (
        call("exec_command", cmd=f"printf 'remember ' > {TASK}"),
        call("exec_command", cmd=f"echo the milk >> {TASK}"),
        call("exec_command", cmd=f"cat {TASK}"),
        DONE,
    ),
    {".codex/config.toml": CONFIG},
)
