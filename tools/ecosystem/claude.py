"""Claude Code, which speaks messages alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.ecosystem.agents import DONE, REQUEST
from tools.ecosystem.sessions import SessionAgent
from tools.harness.agents import TASK, call

COMMAND = ("claude", "-p", REQUEST, "--dangerously-skip-permissions")


class ClaudeCode(SessionAgent):
    """Claude Code."""

    small_context = 10_000
    refusal = "Prompt is too long"

    def asking(self, model: str, environment: Mapping[str, str]) -> tuple[Sequence[str], Mapping[str, str]]:
        """The model is named in the environment."""
        return COMMAND, {**environment, "ANTHROPIC_MODEL": model}


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
