"""Coding agents that are run once, without a terminal, on a scripted model: each has to write a file with its own tool.

The scripted model thinks, calls the agent's tool with the arguments that the agent expects, and ends when it has the
result. Thinking is switched on where the agent has a switch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tools.harness.agents import TASK, agent_model, call, say

TEXT = "remember the milk\n"
REQUEST = f"Write {TASK}"
CONTEXT = 200_000  # tokens: a scripted model has one for each byte of a prompt
TIMEOUT = 300  # seconds for an installation, and for a run
DONE = say("The file is written.")


@dataclass(frozen=True, slots=True)
class Agent:
    """Agent under test. In commands, files and variables {url} is the API's, {base} the server's, {work} the working
    directory, {model} the key of its model.

    answers: of its model. files: by their path below the home directory. setup: a command to run before.
    """

    name: str
    package: str
    command: Sequence[str]
    answers: Sequence[str]
    files: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    setup: Sequence[str] = ()

    @property
    def key(self) -> str:
        """Key of its model."""
        return f"for-{self.name}"

    @property
    def directory(self) -> str:
        """Name of the directory of its environment."""
        return self.package.removeprefix("pypi:").replace("/", "-")

    def write_model(self, directory: Path) -> str:
        """Write its model; returns its section of the configuration."""
        path = agent_model(directory / self.key, self.answers, context=CONTEXT)
        return f'[models.{self.key}]\nsource = "{path}"\ncontext_length = {CONTEXT}\n'

    def try_out(self, directory: Path, url: str) -> str:
        """Install the agent into a directory and run it; one line on what it did.

        Raises:
            CalledProcessError, TimeoutExpired: it failed.
            ValueError: the file is missing, or has another text.
        """
        with self.prepared(directory, url) as (work, environment):
            for command in filter(None, (self.setup, self.command)):
                filled = [self.fill(part, url, work) for part in command]
                _run(filled, cwd=work, env=environment, stdin=subprocess.DEVNULL)
            written = work / TASK
            if not written.exists() or written.read_text().strip() != TEXT.strip():
                raise ValueError(
                    f"{TASK} is {written.read_text() if written.exists() else 'missing'!r}; expected {TEXT!r}"
                )
        return f"wrote {TASK} with its own tool"

    @contextmanager
    def prepared(self, directory: Path, url: str) -> Iterator[tuple[Path, dict[str, str]]]:
        """Install the agent into a directory: an empty working directory, and the environment of its commands.

        Raises CalledProcessError, TimeoutExpired.
        """
        programs = self._install(directory)
        with tempfile.TemporaryDirectory() as temporary:
            home, work = Path(temporary) / "home", Path(temporary) / "work"
            home.mkdir()
            work.mkdir()
            for name, text in self.files.items():
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                (home / name).write_text(self.fill(text, url, work))
            variables = {name: self.fill(value, url, work) for name, value in self.variables.items()}
            own = {"HOME": str(home), "PWD": str(work), "PATH": f"{programs}:{os.environ['PATH']}"}
            try:
                yield work, {**os.environ, **own, **variables}
            finally:
                subprocess.run(["pkill", "-f", temporary], check=False)  # what it left running there

    def _install(self, directory: Path) -> Path:
        """Install the package, from npm, or from PyPI for a name with "pypi:"; the directory of its programs."""
        directory.mkdir(parents=True, exist_ok=True)
        if not self.package.startswith("pypi:"):
            if not (directory / "node_modules").exists():
                flags = ["--silent", "--no-fund", "--no-audit", "--prefix", str(directory)]
                _run(["npm", "install", *flags, self.package])
            return directory / "node_modules" / ".bin"
        programs = directory / "venv" / "bin"
        if not programs.exists():
            _run([sys.executable, "-m", "venv", str(programs.parent)])
            package = self.package.removeprefix("pypi:")
            _run([str(programs / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check", package])
        return programs

    def fill(self, text: str, url: str, work: Path) -> str:
        """The text with the URLs of the API and of the server, the working directory and the key of the model."""
        words = {"url": f"{url}/v1", "base": url, "work": str(work), "model": self.key}
        for name, word in words.items():
            text = text.replace(f"{{{name}}}", word)
        return text


def _run(command: Sequence[str], **options: object) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT, **options)  # type: ignore[call-overload]


OPENCODE = """\
{"share": "disabled", "autoupdate": false, "permission": {"*": "allow"}, "provider": {"local": {
  "npm": "@ai-sdk/openai-compatible", "options": {"baseURL": "{url}", "apiKey": "none"},
  "models": {"{model}": {"reasoning": true, "tool_call": true, "limit": {"context": 200000, "output": 8000}}}}}}
"""
PI = """\
{"providers": {"local": {"baseUrl": "{url}", "api": "openai-completions", "apiKey": "none", "models": [
  {"id": "{model}", "name": "local", "reasoning": true, "input": ["text"], "contextWindow": 200000, "maxTokens": 8000,
   "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}}]}}}
"""
CONTINUE = """\
name: local
version: 1.0.0
schema: v1
models:
  - name: local
    provider: openai
    model: {model}
    apiBase: {url}
    apiKey: none
    roles: [chat, edit, apply]
    capabilities: [tool_use]
    defaultCompletionOptions: {contextLength: 200000, maxTokens: 8000, reasoning: true}
"""
OPENAI = {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": "{url}", "OPENAI_API_BASE": "{url}", "OPENAI_MODEL": "{model}"}

AGENTS = (
    *(
        Agent(
            name,
            "opencode-ai",
            ("opencode", "run", "--auto", "-m", "local/{model}", "--variant", "high", REQUEST),
            (call("write", filePath=TASK, content=TEXT), DONE),
            {".config/opencode/opencode.json": OPENCODE.replace("@ai-sdk/openai-compatible", provider)},
        )
        for name, provider in (
            ("opencode", "@ai-sdk/openai-compatible"),  # chat completions
            ("opencode-messages", "@ai-sdk/anthropic"),
            ("opencode-responses", "@ai-sdk/openai"),
        )
    ),
    Agent(
        "qwen-code",
        "@qwen-code/qwen-code",
        ("qwen", "--auth-type", "openai", "-y", "-m", "{model}", REQUEST),
        (call("run_shell_command", command=f"echo {TEXT.strip()} > {TASK}", is_background=False), DONE),
        variables=OPENAI,
    ),
    Agent(
        "pi",
        "@mariozechner/pi-coding-agent",
        ("pi", "--offline", "--provider", "local", "--model", "{model}", "--thinking", "high", "-p", REQUEST),
        (call("write", path=TASK, content=TEXT), DONE),
        {".pi/agent/models.json": PI},
    ),
    Agent(
        "continue",
        "@continuedev/cli",
        ("sh", "-c", f"cn --config $HOME/continue.yaml --auto -p '{REQUEST}'"),
        (call("Write", filepath=TASK, content=TEXT), DONE),
        {"continue.yaml": CONTINUE},
    ),
    Agent(
        "cline",
        "cline",
        ("cline", "--auto-approve", "true", "--thinking", "high", "-c", "{work}", REQUEST),
        (call("run_commands", commands=[f"echo {TEXT.strip()} > {TASK}"]), DONE),
        setup=("cline", "auth", "openai-compatible", "--apikey", "none", "--modelid", "{model}", "--baseurl", "{url}"),
    ),
    Agent(
        "aider",
        "pypi:aider-chat",
        (
            *("aider", "--model", "openai/{model}", "--yes-always", "--no-check-update", "--no-git", "--no-analytics"),
            *("--no-show-model-warnings", "--reasoning-effort", "high", "--message", REQUEST, TASK),
        ),
        (say(f"{TASK}\n```\n{TEXT}```"),),  # it has no tools: files stand in the answer
        variables=OPENAI,
    ),
)
