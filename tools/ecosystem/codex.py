"""Codex, which speaks responses alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.ecosystem.agents import DONE, REQUEST
from tools.ecosystem.sessions import SessionAgent
from tools.harness.agents import TASK, call

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


class Codex(SessionAgent):
    """Codex."""

    small_context = 4096
    refusal = "ran out of room in the model's context window"

    def asking(self, model: str, environment: Mapping[str, str]) -> tuple[Sequence[str], Mapping[str, str]]:
        """The model is named on the command line."""
        return (*RUN, "-m", model, REQUEST), environment

    def is_refused(self, status: int, output: str) -> bool:
        """Its status tells it, too."""
        return status != 0 and super().is_refused(status, output)


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
