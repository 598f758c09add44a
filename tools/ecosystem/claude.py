"""Claude Code, which speaks messages alone: a task of three calls, also beside a stream; too long a prompt; Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from tools.ecosystem.agents import CONTEXT, DONE, REQUEST, TIMEOUT, Agent
from tools.ecosystem.codex import running_stream, wait_for_requests
from tools.harness.agents import TASK, agent_model, call, say
from tools.harness.scripts import Script

SMALL, ENDLESS = "for-claude-small", "for-claude-endless"
SMALL_CONTEXT = 10_000  # tokens, fewer than those of its prompt
TOO_LONG = "Prompt is too long"  # what it prints once it has understood the refusal
COMMAND = ("claude", "-p", REQUEST, "--dangerously-skip-permissions")


class ClaudeCode(Agent):
    """Claude Code with models of its own: one that does the task, one of a small context, one that never ends."""

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
            output = _claude(SMALL, work, environment).communicate(timeout=TIMEOUT)[0]
            if TOO_LONG not in output:
                raise ValueError(f"too long a prompt: {output}")
            done.append("found the context too small")
            running = _claude(ENDLESS, work, environment)
            wait_for_requests(url, ENDLESS, 1)
            running.send_signal(signal.SIGINT)
            running.communicate(timeout=TIMEOUT)
            wait_for_requests(url, ENDLESS, 0)
            done.append("freed its slot at Ctrl-C")
        return ", ".join(done)


def _claude(model: str, work: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        COMMAND,
        cwd=work,
        env={**environment, "ANTHROPIC_MODEL": model},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


CLAUDE = ClaudeCode(
    "claude",
    "@anthropic-ai/claude-code",
    COMMAND,
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
        "IS_SANDBOX": "1",  # where root may skip the permissions, too
    },
    # What npm's script of the package does, which may be switched off.
    setup=("sh", "-c", 'node "$(dirname "$(command -v claude)")/../@anthropic-ai/claude-code/install.cjs"'),
)
