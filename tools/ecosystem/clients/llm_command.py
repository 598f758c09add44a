# mypy: ignore-errors
"""The llm command line, with the server in its list of OpenAI-compatible models."""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

QUESTION = "What is the capital of France?"
SCHEMA = '{"type": "object", "properties": {"city": {"enum": ["Paris", "London"]}}, "required": ["city"]}'
MODELS = f"""- model_id: local
  model_name: {os.environ["MODEL"]}
  api_base: {os.environ["OPENAI_BASE_URL"]}
  supports_schema: true
  supports_tools: true
"""
print("llm", version("llm"))

with tempfile.TemporaryDirectory() as home:
    (Path(home) / "extra-openai-models.yaml").write_text(MODELS)

    def ask(*flags: str) -> str:
        """What the command prints."""
        command = [sys.executable, "-m", "llm", "-m", "local", "-o", "max_tokens", "40", "-o", "temperature", "0"]
        environment = {**os.environ, "LLM_USER_PATH": home}
        return subprocess.run([*command, *flags, QUESTION], env=environment, check=True, stdout=-1, text=True).stdout

    assert "Paris" in ask("--no-stream")
    print("chat")
    assert "Paris" in ask()
    print("stream")
    assert '"city"' in ask("--no-stream", "--schema", SCHEMA)
    print("structured")
