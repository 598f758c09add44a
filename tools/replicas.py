"""Two servers behind nginx with the configuration of deploy/nginx, while one of them is restarted.

Run: python -m tools.replicas [--conversations 100] [--turns 10]. It needs nginx and its JavaScript module
(apt install nginx libnginx-mod-http-js). Conversations grow turn by turn, half of the turns as streams. Prints, with
and without the routing by conversation, the failed requests, and the share of prompt tokens found in the prefix caches.
Exit status 1 if a request failed other than a stream that was open on the restarted server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.harness.models import SENTENCES, tiny_llama
from tools.harness.running_server import RunningServer, eventually, running_server

DEPLOY = Path(__file__).parent.parent / "deploy" / "nginx"
MODULES = "/etc/nginx/modules-enabled/*.conf"
AT_ONCE = 8  # conversations
ANSWER = 16  # tokens


@dataclass
class Outcome:
    """Counts of the clients of one run."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    later_turns: int = 0
    later_hits: int = 0
    broken_streams: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, turn: int, usage: dict[str, Any]) -> None:
        """Count a whole answer."""
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        with self.lock:
            self.prompt_tokens += usage["prompt_tokens"]
            self.cached_tokens += cached
            self.later_turns += turn > 0
            self.later_hits += turn > 0 and cached > 0

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, failed {sum(self.failures.values())}, streams cut {self.broken_streams}; "
            f"prompt tokens from a prefix cache {self.cached_tokens / max(1, self.prompt_tokens):.1%}, "
            f"later turns with a hit {self.later_hits / max(1, self.later_turns):.1%}"
        )


class StreamCut(Exception):
    """A stream ended before its [DONE]."""


@contextmanager
def balancer(directory: Path, ports: tuple[int, int], is_routed: bool) -> Iterator[int]:
    """Port of an nginx in front of two servers. The configuration is deploy's, with other ports."""
    port = free_port()
    text = (DEPLOY / "mlx-servers.conf").read_text()
    for before, after in ((8001, ports[0]), (8002, ports[1]), (8080, port)):
        text = text.replace(f"127.0.0.1:{before}", f"127.0.0.1:{after}")
    text = text.replace("/etc/nginx/conversation.js", str(DEPLOY / "conversation.js"))
    if not is_routed:
        text = text.replace("hash $conversation consistent;", "")
    file = directory / "nginx.conf"
    file.write_text(
        f"include {MODULES};\ndaemon off;\npid {directory}/nginx.pid;\nerror_log {directory}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log {directory}/access.log;\n{text}\n}}\n"
    )
    process = subprocess.Popen(["nginx", "-c", str(file)])
    try:
        eventually(lambda: answers(port, "/balancer") or process.poll() is not None)
        yield port
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(port: int, path: str) -> bool:
    """Whether a server answers there with success."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().status < 300
    except OSError:
        return False


class Clients:
    """Clients of the balancer."""

    def __init__(self, port: int, turns: int) -> None:
        self._port = port
        self._turns = turns
        self.outcome = Outcome()

    def converse(self, number: int) -> None:
        """Run one conversation, turn by turn. A turn that fails has no answer, and the next one follows without it."""
        draw = random.Random(number)
        messages = [{"role": "system", "content": f"{number}. {' '.join(draw.choices(SENTENCES, k=3))}"}]
        for turn in range(self._turns):
            messages.append({"role": "user", "content": f"{turn}. {draw.choice(SENTENCES)}"})
            with self.outcome.lock:
                self.outcome.requests += 1
            try:
                text, usage = self._ask(messages, streams=draw.random() < 0.5)
            except StreamCut:
                self.outcome.broken_streams += 1
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                with self.outcome.lock:
                    self.outcome.failures[str(error)[:200]] += 1
            else:
                self.outcome.note(turn, usage)
                messages.append({"role": "assistant", "content": text})

    def _ask(self, messages: list[dict[str, str]], streams: bool) -> tuple[str, dict[str, Any]]:
        body = {"model": "tiny", "messages": messages, "max_tokens": ANSWER, "temperature": 0}
        if streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {response.read()!r}")
            return streamed(response) if streams else whole(response)
        finally:
            connection.close()


def whole(response: http.client.HTTPResponse) -> tuple[str, dict[str, Any]]:
    """Text and usage of an answer without streaming."""
    answer = json.loads(response.read())
    return answer["choices"][0]["message"]["content"], answer["usage"]


def streamed(response: http.client.HTTPResponse) -> tuple[str, dict[str, Any]]:
    """Text and usage of a stream. Raises StreamCut."""
    text, usage = "", None
    try:
        lines = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    except (OSError, http.client.HTTPException) as error:
        raise StreamCut(str(error)) from None
    if lines[-1:] != [b"[DONE]"]:
        raise StreamCut("no [DONE]")
    for chunk in map(json.loads, lines[:-1]):
        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        usage = chunk.get("usage") or usage
    assert usage
    return text, usage


class Replica:
    """One of the servers; it can be restarted on its port."""

    def __init__(self, model: Path) -> None:
        self.port = free_port()
        self._flags = ("--no-defaults", "--model", f"tiny={model}", "--log-level", "warning", "--port", str(self.port))
        self._running = ExitStack()
        self.start()

    def start(self) -> None:
        """Start the server, and load its model."""
        self._server: RunningServer = self._running.enter_context(running_server(*self._flags))
        self._server.post("/v1/models/load", {"model": self._flags[2].partition("=")[2], "key": "tiny"})

    def restart(self) -> None:
        """Stop the server as a service manager does, and start it again."""
        self._server.stop()
        self.start()

    def close(self) -> None:
        """Stop the server."""
        self._running.close()


def run(model: Path, directory: Path, conversations: int, turns: int, is_routed: bool) -> Outcome:
    """Run all conversations, with a restart of one server among them."""
    with ExitStack() as stack:
        replicas = [stack.enter_context(closing_replica(model)) for _ in range(2)]
        port = stack.enter_context(balancer(directory, (replicas[0].port, replicas[1].port), is_routed))
        clients = Clients(port, turns)
        with ThreadPoolExecutor(AT_ONCE + 1) as pool:
            restart = pool.submit(restart_midway, replicas[0], clients.outcome, conversations * turns)
            for talk in [pool.submit(clients.converse, number) for number in range(conversations)]:
                talk.result()
            restart.result()
        return clients.outcome


@contextmanager
def closing_replica(model: Path) -> Iterator[Replica]:
    """A replica that is stopped at the end."""
    replica = Replica(model)
    try:
        yield replica
    finally:
        replica.close()


def restart_midway(replica: Replica, outcome: Outcome, total: int) -> None:
    """Restart the replica when a third of the requests has been sent."""
    while outcome.requests < total // 3:
        time.sleep(0.01)
    replica.restart()
    print(f"  one server was restarted; {outcome.requests} of {total} requests had been sent", flush=True)


def main() -> int:
    """Run with and without routing, and print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--turns", type=int, default=10)
    arguments = parser.parse_args()
    if not shutil.which("nginx"):
        print("error: nginx is not installed: apt install nginx libnginx-mod-http-js", file=sys.stderr)
        return 2
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        model = tiny_llama(Path(name) / "tiny", context=4096)
        for is_routed in (True, False):
            print("by conversation:" if is_routed else "round robin:", flush=True)
            outcome = run(model, Path(name), arguments.conversations, arguments.turns, is_routed)
            print(f"  {outcome}", flush=True)
            for failure, count in outcome.failures.items():
                print(f"  {count} x {failure}")
            failed += sum(outcome.failures.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
