"""Programs that can be launched, as data: what each one has to be told to use a server.

In commands, variables and files, {url} is the API's URL with /v1, {root} without it, {model} the model's key, {key} the
API key, {context} the context in tokens, and {files} the directory that the files are written into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Program:
    """A program. package: how it is installed. files: text by name.

    setup: commands that change the program's own settings, which are the user's: a program with such is never started
    from here.
    """

    name: str
    package: str
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[tuple[str, ...], ...] = ()


OPENAI = {"OPENAI_API_KEY": "{key}", "OPENAI_BASE_URL": "{url}"}
OPENCODE = """\
{
  "$schema": "https://opencode.ai/config.json",
  "provider": {
    "local": {
      "npm": "@ai-sdk/openai-compatible",
      "options": {"baseURL": "{url}", "apiKey": "{key}"},
      "models": {"{model}": {"reasoning": true, "tool_call": true, "limit": {"context": {context}, "output": 8192}}}
    }
  }
}
"""
PI = """\
{
  "providers": {
    "local": {
      "baseUrl": "{url}",
      "api": "openai-completions",
      "apiKey": "{key}",
      "models": [
        {
          "id": "{model}", "name": "{model}", "reasoning": true, "input": ["text"], "contextWindow": {context},
          "maxTokens": 8192, "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}
        }
      ]
    }
  }
}
"""
CONTINUE = """\
name: local
version: 1.0.0
schema: v1
models:
  - name: {model}
    provider: openai
    model: {model}
    apiBase: {url}
    apiKey: {key}
    roles: [chat, edit, apply]
    capabilities: [tool_use]
    defaultCompletionOptions: {contextLength: {context}, maxTokens: 8192}
"""
CODEX = (
    *("-c", 'model_provider="local"', "-c", 'model_providers.local.name="local"'),
    *("-c", 'model_providers.local.base_url="{url}"', "-c", 'model_providers.local.wire_api="responses"'),
    *("-c", 'model_providers.local.env_key="OPENAI_API_KEY"', "-c", "model_context_window={context}"),
)

PROGRAMS = {
    program.name: program
    for program in (
        Program(
            "claude",
            "npm install -g @anthropic-ai/claude-code",
            ("claude",),
            {
                "ANTHROPIC_BASE_URL": "{root}",
                "ANTHROPIC_AUTH_TOKEN": "{key}",
                "ANTHROPIC_MODEL": "{model}",
                "ANTHROPIC_DEFAULT_HAIKU_MODEL": "{model}",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            },
        ),
        Program(
            "codex",
            "npm install -g @openai/codex",
            ("codex", *CODEX, "-m", "{model}"),
            {"OPENAI_API_KEY": "{key}"},
        ),
        Program(
            "opencode",
            "npm install -g opencode-ai",
            ("opencode", "-m", "local/{model}"),
            {"OPENCODE_CONFIG": "{files}/opencode.json"},
            {"opencode.json": OPENCODE},
        ),
        Program(
            "qwen-code",
            "npm install -g @qwen-code/qwen-code",
            ("qwen", "--auth-type", "openai", "-m", "{model}"),
            {**OPENAI, "OPENAI_MODEL": "{model}"},
        ),
        Program(
            "pi",
            "npm install -g @mariozechner/pi-coding-agent",
            ("pi", "--provider", "local", "--model", "{model}"),
            {"PI_CODING_AGENT_DIR": "{files}"},
            {"models.json": PI},
        ),
        Program(
            "cline",
            "npm install -g cline",
            ("cline",),
            setup=(
                (
                    "cline",
                    "auth",
                    "openai-compatible",
                    "--apikey",
                    "{key}",
                    "--modelid",
                    "{model}",
                    "--baseurl",
                    "{url}",
                ),
            ),
        ),
        Program(
            "aider",
            "pip install aider-chat",
            ("aider", "--model", "openai/{model}", "--no-show-model-warnings"),
            {"OPENAI_API_KEY": "{key}", "OPENAI_API_BASE": "{url}"},
        ),
        Program(
            "continue",
            "npm install -g @continuedev/cli",
            ("cn", "--config", "{files}/continue.yaml"),
            files={"continue.yaml": CONTINUE},
        ),
    )
}
