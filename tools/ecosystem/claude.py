"""Claude Code on scripted models, without a terminal: a task with three calls, also beside a running stream of another
model, a prompt that is too long, and an interrupt.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.ecosystem.agents import DONE, REQUEST, Agent, Workplace
from tools.harness.agents import TASK, agent_model, call
from tools.harness.models import scripted_model
from tools.harness.scripts import Script

SHORT = 10_000  # tokens of context, fewer than those of its prompt
ENDLESS = "forever"  # the word in a message to the model that ends by itself never
DEADLINE = 120.0  # seconds that a request may take to begin, and to end
TOO_LONG = "Prompt is too long"  # what it writes once it has understood the server's refusal


class ClaudeCode(Agent):
    """The agent and its models: the one of the task, one with a short context, one without an end."""

    def write_model(self, directory: Path) -> str:
        """Write its models; returns their sections of the configuration."""
        short = agent_model(directory / "for-claude-short", self.answers, context=SHORT)
        endless = scripted_model(
            directory / "for-claude-endless", {ENDLESS: Script(["tick ", "tock "], endless=True)}, context=200_000
        )
        sections = [
            f'[models.{self.key}-short]\nsource = "{short}"\ncontext_length = {SHORT}\n',
            f'[models.{self.key}-endless]\nsource = "{endless}"\ncontext_length = 200000\n',
        ]
        return "\n".join([Agent.write_model(self, directory), *sections])

    def try_out(self, directory: Path, url: str) -> str:
        """Install it and run all four; one line on what it did. Raises CalledProcessError, ValueError."""
        Agent.try_out(self, directory, url)
        with _stream(f"{self.key}-endless", url):
            Agent.try_out(self, directory, url)
        with self.workplace(directory, url) as place:
            self._overflow(place)
            self._interrupt(place, url)
        return f"wrote {TASK} with three calls, twice; understood a refusal; left at an interrupt"

    def _overflow(self, place: Workplace) -> None:
        """Ask a model whose context is shorter than the prompt."""
        done = subprocess.run(
            place.fill(self.command),
            cwd=place.work,
            env={**place.environment, "ANTHROPIC_MODEL": f"{self.key}-short"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        if done.returncode == 0 or TOO_LONG not in done.stdout:
            raise ValueError(f"a prompt that is too long gave {done.returncode}, {done.stdout!r}")

    def _interrupt(self, place: Workplace, url: str) -> None:
        """Interrupt it within an answer; the server has no request left."""
        model = f"{self.key}-endless"
        with subprocess.Popen(
            place.fill(self.command),
            cwd=place.work,
            env={**place.environment, "ANTHROPIC_MODEL": model},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from a terminal reaches all of its processes
        ) as process:
            try:
                _wait_for_requests(model, url, 1)
                os.killpg(process.pid, signal.SIGINT)
                _wait_for_requests(model, url, 0)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _stream(model: str, url: str) -> Iterator[None]:
    """A stream without an end, which is still being sent at the end of the block."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": ENDLESS}]}
    request = urllib.request.Request(f"{url}/v1/messages", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=DEADLINE) as response:
        response.readline()
        yield
        if not response.readline():
            raise ValueError("the stream beside it ended")


def _wait_for_requests(model: str, url: str, count: int) -> None:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{url}/v1/models/{model}", timeout=DEADLINE) as response:
            if json.load(response)["running_requests"] == count:
                return
        time.sleep(0.1)
    raise ValueError(f"{model} has not come to {count} running requests")


CLAUDE = ClaudeCode(
    "claude",
    "@anthropic-ai/claude-code",
    ("node", "{modules}/@anthropic-ai/claude-code/cli-wrapper.cjs", "-p", REQUEST, "--dangerously-skip-permissions"),
    (
        call("Write", file_path=TASK, content="remember the bread\n"),
        call("Edit", file_path=TASK, old_string="bread", new_string="milk"),
        call("Bash", command=f"cat {TASK}", description="Show the file"),
        DONE,
    ),
    variables={
        "ANTHROPIC_BASE_URL": "{base}",
        "ANTHROPIC_API_KEY": "none",
        "ANTHROPIC_MODEL": "{model}",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "{model}",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "IS_SANDBOX": "1",  # a container's root may skip the permissions, too
    },
)
