"""Agents that are tried in several runs: a task, also beside a stream; too long a prompt; Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from tools.ecosystem.agents import CONTEXT, TIMEOUT, Agent
from tools.harness.agents import agent_model, say
from tools.harness.scripts import Script

OTHER = "smollm2"


class SessionAgent(Agent):
    """Agent with models of its own: one that does the task, one of a small context, one that never ends.

    small_context: tokens, fewer than those of its prompt. refusal: what it prints once it has understood that.
    """

    small_context: ClassVar[int]
    refusal: ClassVar[str]

    def asking(self, model: str, environment: Mapping[str, str]) -> tuple[Sequence[str], Mapping[str, str]]:
        """The command and the environment with which it asks a model."""
        raise NotImplementedError

    def is_refused(self, status: int, output: str) -> bool:
        """Whether a run ended because the prompt was too long."""
        return self.refusal in output

    def write_model(self, directory: Path) -> str:
        """Write its models; returns their sections of the configuration."""
        small = agent_model(directory / self._small, [say("Never.")], context=self.small_context)
        endless = Script(["Hm.", "\n</think>\n\n", "tick ", "tock "], endless=True)
        forever = agent_model(directory / self._endless, [endless], context=CONTEXT)
        return (
            f"{super().write_model(directory)}"
            f'[models.{self._small}]\nsource = "{small}"\n'
            f'[models.{self._endless}]\nsource = "{forever}"\ncontext_length = {CONTEXT}\n'
        )

    def try_out(self, directory: Path, url: str) -> str:
        """Install it into a directory and run it; one line on what it did.

        Raises:
            CalledProcessError, TimeoutExpired: it failed.
            ValueError: the file is missing or has another text, or what it printed is not what happened.
        """
        done = [super().try_out(directory, url)]
        with running_stream(url):
            super().try_out(directory, url)
            done.append("again beside a stream")
        with self.prepared(directory, url) as (work, environment):
            refused = self._start(self._small, work, environment)
            output, _ = refused.communicate(timeout=TIMEOUT)
            if not self.is_refused(refused.returncode, output):
                raise ValueError(f"too long a prompt: status {refused.returncode}, {output}")
            done.append("found the context too small")
            running = self._start(self._endless, work, environment)
            wait_for_requests(url, self._endless, 1)
            running.send_signal(signal.SIGINT)
            running.communicate(timeout=TIMEOUT)
            wait_for_requests(url, self._endless, 0)
            done.append("freed its slot at Ctrl-C")
        return ", ".join(done)

    @property
    def _small(self) -> str:
        return f"{self.key}-small"

    @property
    def _endless(self) -> str:
        return f"{self.key}-endless"

    def _start(self, model: str, work: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        command, variables = self.asking(model, environment)
        return subprocess.Popen(
            command,
            cwd=work,
            env=variables,
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
