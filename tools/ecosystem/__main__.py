"""Round trips with widely used clients and coding agents (agents.py), against a running server.

Clients use the embedded models and a reranker of random weights, agents a scripted model each, lm-eval (scoring.py) one
of random weights; schemathesis (contract.py) asks for any of them.

Each client is installed into a separate environment, which is removed afterwards (or kept with --keep DIRECTORY, so
that a second run starts at once), and prints one line on what it did. The exit status is the number of failed clients.

    python -m tools.ecosystem [--keep DIRECTORY] [NAME ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.ecosystem.agents import AGENTS as OTHERS
from tools.ecosystem.agents import Agent
from tools.ecosystem.claude import CLAUDE
from tools.ecosystem.codex import CODEX
from tools.ecosystem.contract import Contract
from tools.ecosystem.scoring import Scoring
from tools.harness.encoder_models import tiny_cross_encoder

AGENTS = (*OTHERS, CODEX, CLAUDE)

ROOT = Path(__file__).parent.parent.parent
CLIENTS = Path(__file__).parent / "clients"
GREETING = "Serving on "
MODEL, VECTORS, RERANKER = "smollm2", "minilm", "reranker"
TIMEOUT = 600  # seconds for an installation, and for the round trips of one client


@dataclass(frozen=True, slots=True)
class Client:
    """Client under test: its script, and the packages that it needs (from PyPI for .py, from npm for .mjs)."""

    name: str
    script: str
    packages: tuple[str, ...]

    def install(self, directory: Path) -> list[str]:
        """Install the client into a directory; the command that runs its script there."""
        directory.mkdir(parents=True, exist_ok=True)
        if self.script.endswith(".mjs"):
            return self._install_node(directory)
        python = directory / "venv" / "bin" / "python"
        if not python.exists():
            call(sys.executable, "-m", "venv", str(directory / "venv"))
            call(str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *self.packages)
        return [str(python), str(CLIENTS / self.script)]

    @property
    def directory(self) -> str:
        """Name of the directory of its environment."""
        return self.script.partition(".")[0]

    def try_out(self, directory: Path, url: str) -> str:
        """Install the client and run its round trips; one line on what it did. Raises CalledProcessError."""
        environment = {**os.environ, "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none", "MODEL": MODEL}
        environment |= {"VECTORS": VECTORS, "RERANKER": RERANKER}
        return " ".join(call(*self.install(directory), environment=environment).split())

    def _install_node(self, directory: Path) -> list[str]:
        script = directory / self.script
        script.write_text((CLIENTS / self.script).read_text())  # node looks for packages beside the script
        if not (directory / "node_modules").exists():
            call("npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(directory), *self.packages)
        return ["node", str(script)]


ALL = (
    Client("openai (Python)", "openai_python.py", ("openai",)),
    Client("openai (Node)", "openai_node.mjs", ("openai",)),
    Client("litellm", "litellm_client.py", ("litellm", "mcp")),
    Client("langchain-openai", "langchain_client.py", ("langchain-openai",)),
    Client("pydantic-ai", "pydantic_ai_client.py", ("pydantic-ai-slim[openai]",)),
    Client("llm", "llm_command.py", ("llm",)),
    Client("Vercel AI SDK", "vercel_ai.mjs", ("ai", "@ai-sdk/openai-compatible", "zod")),
    Client("Vercel AI SDK, responses", "vercel_responses.mjs", ("ai", "@ai-sdk/openai", "zod")),
    Client("event-stream parsers", "event_streams.mjs", ("eventsource-parser",)),
    Client("httpx-sse", "httpx_sse_client.py", ("httpx-sse", "httpx")),
    Client("langchain-openai, vectors", "langchain_vectors.py", ("langchain-openai", "numpy")),
    Client("llama-index", "llama_index_vectors.py", ("llama-index-core", "llama-index-embeddings-openai-like")),
    Client("Open WebUI's calls", "open_webui_vectors.py", ("httpx",)),
    Client("cohere", "cohere_rerank.py", ("cohere",)),
)
Trial = Client | Agent | Scoring | Contract
WITH_MODELS: tuple[Agent | Scoring | Contract, ...] = (Scoring(), Contract(), *AGENTS)


def call(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end; what it printed. Raises CalledProcessError."""
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=TIMEOUT)
    return done.stdout


@contextmanager
def running_server(directory: Path) -> Iterator[str]:
    """The URL of a server with the embedded model and the others' models, which are written into a directory."""
    sections = [
        f'[models.{MODEL}]\nsource = "embedded:smollm2"\n',
        f'[models.{VECTORS}]\nsource = "embedded:minilm"\n',
        f'[models.{RERANKER}]\nsource = "{tiny_cross_encoder(directory / RERANKER, "bert")}"\n',
        *(each.write_model(directory) for each in WITH_MODELS),
    ]
    (directory / "models.toml").write_text("\n".join(sections))
    command = [sys.executable, "mlx_api_server.py", "--port", "0", "--no-defaults"]
    command += ["--config", str(directory / "models.toml"), "--log-level", "warning"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield next(line.removeprefix(GREETING).strip() for line in process.stdout if line.startswith(GREETING))
        finally:
            process.terminate()


def try_out(client: Trial, directory: Path, url: str) -> bool:
    """Install a client, run its round trips, and print its line; whether all succeeded."""
    fault, summary = "", ""
    try:
        summary = client.try_out(directory, url)
    except subprocess.CalledProcessError as error:
        fault = f"{error.cmd}: {error.stderr.strip() or error.stdout.strip() or error}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        fault = str(error)
    print(f"{'FAILED' if fault else 'ok':<7} {client.name:<22} {summary}", flush=True)
    if fault:
        print(fault, file=sys.stderr, flush=True)
    return not fault


def main() -> int:
    """Try the chosen clients; the number of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.ecosystem", description="Round trips with known clients.")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="directory of the environments")
    parser.add_argument("names", nargs="*", metavar="NAME", help="the clients to try; all by default")
    options = parser.parse_args()
    chosen: list[Trial] = [
        client
        for client in (*ALL, *WITH_MODELS)
        if not options.names or any(name in client.name for name in options.names)
    ]
    with tempfile.TemporaryDirectory() as temporary, running_server(Path(temporary)) as url:
        directory = options.keep or Path(temporary)
        return sum(not try_out(client, directory / client.directory, url) for client in chosen)


if __name__ == "__main__":
    sys.exit(main())
