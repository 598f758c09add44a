"""Session of an agent: the first token of each turn, against that of the same prompt read cold.

The prompt grows turn by turn behind a long system message. Then its last turn is asked anew, each time with another
message: after the model was unloaded, after the server was killed and started again, after another model's load evicted
it. Ratios are those of times to the first token; loading the model is not part of them.

python -m benchmarks.agent_session [--size small] [--tokens 8000] [--kind hybrid] [--out FILE]

Rule: a cold read is one of the same server, with the prefix cache cleared.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from benchmarks.kinds import KINDS, SIZES, write_kind
from benchmarks.machine import has_gpu, read_machine
from benchmarks.servers import ROOT
from benchmarks.vocabulary import Prompts
from tools.harness.running_server import RunningServer, running_server

MODEL, OTHER = "agent", "other"
ANSWER = 16  # tokens
TIMEOUT = 900.0
TARGET = 0.1  # most of a cold read's time to the first token
OPENING = 0.5  # share of the last prompt that the system message and the tools are
ROOM = 1.4  # memory, in reservations of the model, in which no second one fits
PREFIX_BYTES = 20 << 30  # so that no bound of the prefix cache is met

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: seconds to its first token, tokens of its prompt, and those from the prefix cache.

    cpu: of the seconds to the first token, those of the server's threads on a processor; 0 where that is not known.
    """

    ttft: float
    cpu: float
    prompt_tokens: int
    cached_tokens: int
    text: str = field(default="", repr=False)


@dataclass
class Figures:
    """What was measured of a kind. turns: by number, from 1; cold: the same, read cold; again: the last, after what."""

    turns: dict[int, Turn] = field(default_factory=dict)
    cold: dict[int, Turn] = field(default_factory=dict)
    again: dict[str, Turn] = field(default_factory=dict)

    @property
    def rows(self) -> Iterator[tuple[str, Turn, Turn | None]]:
        """All turns, with the cold read to compare them with where there is one."""
        for number, turn in self.turns.items():
            yield f"turn {number}", turn, self.cold.get(number)
        for after, turn in self.again.items():
            yield after, turn, self.cold.get(max(self.cold, default=0))


class Session:
    """The conversation of one kind. lengths: tokens of the system message, and of each user message."""

    def __init__(self, prompts: Prompts, tokens: int, turns: int) -> None:
        self._prompts = prompts
        self._turn_tokens = int(tokens * (1 - OPENING) / turns)
        opening = prompts.make(int(tokens * OPENING))
        self.messages: list[Message] = [{"role": "system", "content": opening}]
        self.asked: list[list[Message]] = []

    def next(self) -> list[Message]:
        """The messages of the next turn."""
        self.messages.append({"role": "user", "content": self._prompts.make(max(8, self._turn_tokens - ANSWER))})
        self.asked.append(list(self.messages))
        return self.asked[-1]

    def answered(self, text: str) -> None:
        """Add the answer."""
        self.messages.append({"role": "assistant", "content": text})

    def variant(self) -> list[Message]:
        """The last turn with another message of the user."""
        return [*self.asked[-1][:-1], {"role": "user", "content": self._prompts.make(self._turn_tokens - ANSWER)}]


def ask(server: RunningServer, messages: Sequence[Message], model: str = MODEL) -> Turn:
    """Stream one answer."""
    body = {"model": model, "messages": messages, "max_tokens": ANSWER, "temperature": 0, "stream": True}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    text, first, busy = "", 0.0, 0.0
    usage: dict[str, Any] = {}
    start, cpu = time.perf_counter(), cpu_seconds(server)
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream_options": {"include_usage": True}}))
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
        said = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if said and not first:
            first, busy = time.perf_counter() - start, cpu_seconds(server) - cpu
        text, usage = text + said, event.get("usage") or usage
    connection.close()
    return Turn(first, busy, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], text)


def cpu_seconds(server: RunningServer) -> float:
    """Seconds that the server's threads were on a processor; 0 where the system does not report them."""
    stat = Path(f"/proc/{server.process.pid}/stat")
    if not stat.exists():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def send(server: RunningServer, method: str, path: str, **body: Any) -> Any:
    """Send a request to an endpoint of the server's own, which may take long."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    connection.request(method, path, json.dumps(body) if body else None)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise RuntimeError(answer["error"]["message"])
    return answer


def load(server: RunningServer, model: str = MODEL) -> None:
    """Load a model by a request, which also warms it up."""
    ask(server, [{"role": "user", "content": "Warm up."}], model)


def settle(server: RunningServer) -> None:
    """Wait until what was read is on disk."""
    seen: list[Any] = []
    while len(seen) < 4 or seen[-1] != seen[-3]:
        time.sleep(0.5)
        seen.append(send(server, "GET", "/v1/cache")["disk"])


@contextmanager
def serving(models: dict[str, Path], tokens: int, cache: Path, *flags: str) -> Iterator[RunningServer]:
    """A server of some models, which are loaded on demand. tokens: of the longest prompt; cache: a folder."""
    fields = f"cache_tokens = {tokens * 5 // 4 + 1024}\nprefix_cache_bytes = {PREFIX_BYTES}\n"
    config = cache / "models.toml"
    config.write_text("".join(f'[models.{key}]\nsource = "{path}"\n{fields}' for key, path in models.items()))
    disk = ("--prefix-cache-dir", str(cache / "prefixes"), "--prefix-cache-disk-bytes", str(PREFIX_BYTES))
    with running_server("--no-defaults", "--log-level", "warning", "--config", str(config), *disk, *flags) as server:
        yield server


def measure(kind: str, options: argparse.Namespace, cache: Path, figures: Figures) -> None:
    """Measure one kind, and put what is measured into figures one by one."""
    other = KINDS[KINDS.index(kind) - 1]
    kinds = {MODEL: kind} if options.skip_eviction else {MODEL: kind, OTHER: other}
    models = {
        key: write_kind(of, options.size, options.work.resolve(), tokenizer=options.tokenizer)
        for key, of in kinds.items()
    }
    session = Session(Prompts(models[MODEL]), options.tokens, options.turns)
    with serving(models, options.tokens, cache) as server:
        load(server)
        reserved = send(server, "GET", f"/v1/models/{MODEL}")["reserved_bytes"]
        for number in range(1, options.turns + 1):
            figures.turns[number] = ask(server, session.next())
            session.answered(figures.turns[number].text)
        for number in [*range(2, options.turns, options.cold_every), options.turns]:
            send(server, "POST", "/v1/cache/clear")
            figures.cold[number] = ask(server, session.asked[number - 1])
        settle(server)
        send(server, "POST", "/v1/models/unload", key=MODEL)
        load(server)
        figures.again["after an unload"] = ask(server, session.variant())
        settle(server)
        server.process.kill()
    with serving(models, options.tokens, cache, "--memory-limit", str(int(reserved * ROOM))) as server:
        load(server)
        figures.again["after kill -9"] = ask(server, session.variant())
        if options.skip_eviction:
            return
        settle(server)
        load(server, OTHER)
        if send(server, "GET", f"/v1/models/{MODEL}")["status"]["value"] == "loaded":
            raise RuntimeError("Both models fit, so none was evicted")
        load(server)
        figures.again["after an eviction"] = ask(server, session.variant())


def render(measured: dict[str, Figures]) -> str:
    """The table of all kinds, as Markdown."""
    head = "| kind | turn | prompt tokens | from the cache | TTFT, ms | cold, ms | ratio | ratio of CPU seconds |"
    lines = [head, "| --- " * 8 + "|"]
    for kind, figures in measured.items():
        for name, turn, cold in figures.rows:
            compared = f"{cold.ttft * 1000:,.0f} | {turn.ttft / cold.ttft:.3f}" if cold else "- | -"
            compared += f" | {turn.cpu / cold.cpu:.3f}" if cold and cold.cpu else " | -"
            counts = f"{turn.prompt_tokens:,} | {turn.cached_tokens:,} | {turn.ttft * 1000:,.0f}"
            lines.append(f"| {kind} | {name} | {counts} | {compared} |")
    ratios = [turn.ttft / cold.ttft for each in measured.values() for _, turn, cold in each.rows if cold]
    if ratios:
        over = sum(ratio > TARGET for ratio in ratios)
        lines.append(f"\n{over} of {len(ratios)} compared turns took more than {TARGET:.0%} of a cold read.")
    return "\n".join(lines)


def read_arguments(argv: Sequence[str] | None, gpu: bool) -> argparse.Namespace:
    """Parse the command line. Defaults depend on the device."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agent_session", description=description)
    add = parser.add_argument
    add("--size", choices=SIZES, default="1b" if gpu else "small")
    add("--tokens", type=int, default=32_000 if gpu else 8_000, help="of the last prompt")
    add("--turns", type=int, default=30)
    add("--cold-every", type=int, default=4 if gpu else 7, metavar="N", help="turns from one cold read to the next")
    add("--kind", action="append", choices=KINDS, help="measure only this one")
    add("--skip-eviction", action="store_true", help="no second model, which takes time to make and to load")
    add("--tokenizer", type=Path, metavar="DIR", help="where the models take their tokenizer from")
    add("--work", type=Path, default=ROOT / "build" / "benchmarks", metavar="DIR", help="where models are made")
    add("--limit", type=float, default=0, metavar="S", help="most seconds for each kind; what was measured is shown")
    add("--out", type=Path, metavar="FILE", help="JSON file of the results")
    return parser.parse_args(argv)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer; 0 for no limit."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"{seconds:g} s are over")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Exit status 0 if everything was measured."""
    options = read_arguments(argv, has_gpu())
    measured: dict[str, Figures] = {}
    status = 0
    for kind in options.kind or KINDS:
        measured[kind] = Figures()
        begun = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as cache, limited(options.limit):
                measure(kind, options, Path(cache), measured[kind])
        except (RuntimeError, OSError, KeyError, AssertionError) as error:
            print(f"{kind} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status = 1
        print(f"{kind}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        if options.out:
            sizes = {name: getattr(options, name) for name in ("size", "tokens", "turns")}
            results = {name: asdict(figures) for name, figures in measured.items()}
            content = {"machine": read_machine(), "settings": sizes, "results": results}
            options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(render(measured))
    return status


if __name__ == "__main__":
    sys.exit(main())
