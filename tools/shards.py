"""Two ranks on this machine: the same answers as one process, and errors for clients when a rank is lost.

Run: python -m tools.shards [--prompts 50] [--rank-timeout 3]. Tiny models of random weights, one divided by tensor,
one as a pipeline, each beside the same model in rank 0 alone. Exit status 1 if a promise was broken:

Promise 1: the same answers, greedy and with seeds, eight at a time, while other streams are hung up at random.
Promise 2: when rank 1 is killed or stops responding, its streams end in time with an error that names it; /health names
           it, and the models of rank 0 alone are still served.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tools.harness.models import SENTENCES, tiny_llama
from tools.harness.ranks import Ranks, running_ranks, tiny_qwen
from tools.harness.running_server import RunningServer, eventually

AT_ONCE = 8
ANSWER = 24  # tokens
SETTINGS = """
rank_timeout = {timeout}
[models.tensor]
source = "{directory}/llama"
shard = "tensor"
preload = true
max_running = 8
[models.pipeline]
source = "{directory}/qwen"
shard = "pipeline"
preload = true
max_running = 8
[models.llama]
source = "{directory}/llama"
preload = true
[models.qwen]
source = "{directory}/qwen"
preload = true
"""
UNSHARDED = {"tensor": "llama", "pipeline": "qwen"}


def write_settings(directory: Path, timeout: float) -> Path:
    """Write the models and a settings file into a directory; the file."""
    tiny_llama(directory / "llama")
    tiny_qwen(directory / "qwen", layers=3)  # an uneven pipeline
    file = directory / "settings.toml"
    file.write_text(SETTINGS.format(directory=directory, timeout=timeout))
    return file


def ask(server: RunningServer, key: str, number: int, seeded: bool) -> dict[str, Any]:
    """Answer of a model to a prompt: its text, tokens and finish reason."""
    draw = random.Random(number)
    prompt = " ".join(draw.choices(SENTENCES, k=draw.randint(1, 12)))
    sampling = {"temperature": 0.9, "top_p": 0.95, "seed": number} if seeded else {"temperature": 0}
    answer = server.chat(key, prompt, max_tokens=draw.randint(2, ANSWER), logprobs=True, **sampling).json
    choice = answer["choices"][0]
    tokens = [each["bytes"] for each in choice["logprobs"]["content"]]
    return {"text": choice["message"]["content"], "tokens": tokens, "reason": choice["finish_reason"]}


def compare(server: RunningServer, key: str, prompts: int, seeded: bool) -> int:
    """The number of prompts that the sharded model and the same model in one process answer differently."""

    def both(number: int) -> bool:
        return ask(server, key, number, seeded) == ask(server, UNSHARDED[key], number, seeded)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return prompts - sum(pool.map(both, range(prompts)))


def hang_up(server: RunningServer, done: threading.Event, seed: int) -> int:
    """Start streams and hang up after a few tokens, until `done`; the number of streams."""
    draw, count = random.Random(seed), 0
    while not done.is_set():
        with server.stream(
            draw.choice(list(UNSHARDED)), draw.choice(SENTENCES), max_tokens=500, temperature=0
        ) as stream:
            stream.read(draw.randint(1, 6))
        count += 1
    return count


def same_answers(server: RunningServer, prompts: int) -> int:
    """Compare all answers, with hang-ups meanwhile; the number of differences."""
    different = 0
    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        leaving = [pool.submit(hang_up, server, done, seed) for seed in range(2)]
        try:
            for key in UNSHARDED:
                for seeded in (False, True):
                    found = compare(server, key, prompts, seeded)
                    print(
                        f"{key}, {'seeded' if seeded else 'greedy'}: {prompts - found} of {prompts} equal", flush=True
                    )
                    different += found
        finally:
            done.set()
    print(f"streams hung up meanwhile: {sum(each.result() for each in leaving)}")
    return different


def lose_rank(ranks: Ranks, key: str, remove: Callable[[], None], limit: float) -> list[str]:
    """Remove rank 1 in the middle of eight streams of one model; the broken promises. Prints what each client received.

    limit: seconds until the last stream must have ended.
    """
    begun = threading.Barrier(AT_ONCE + 1)
    removed = [0.0]

    def read(number: int) -> tuple[int, float, object]:
        with ranks.server.stream(key, SENTENCES[number % 4], max_tokens=2000, temperature=0) as stream:
            payloads = stream.read(3)
            begun.wait()
            payloads += list(stream)
            return len(payloads), time.monotonic() - removed[0], payloads[-1]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        readers = [pool.submit(read, number) for number in range(AT_ONCE)]
        begun.wait()
        removed[0] = time.monotonic()
        remove()
        seen = [reader.result() for reader in readers]
    for number, (count, seconds, last) in enumerate(seen):
        print(f"  client {number}: {count} events, the last {seconds:.3f} s after the loss: {last}")
    wrong = [f"client received {last}" for _, _, last in seen if "Rank 1" not in str(last)]
    return wrong + [f"took {seconds:.1f} s" for _, seconds, _ in seen if seconds > limit]


def after_loss(ranks: Ranks) -> list[str]:
    """The promises about the rest that are broken after the loss of rank 1."""
    health = ranks.server.get("/health").json
    print(f"  /health: {health['status']}, ranks {health['ranks']}")
    alone = ranks.server.chat("llama", "Hello", max_tokens=4)
    sharded = ranks.server.chat("tensor", "Hello", max_tokens=4)
    print(
        f"  a model of rank 0 alone: {alone.status}; a sharded one: {sharded.status} {sharded.json['error']['message']}"
    )
    ended = ranks.server.stop()
    print(f"  rank 0 ended with status {ended.status}")
    right = {
        "health": health["ranks"][1]["status"] == "lost",
        "alone": alone.status == 200,
        "503": sharded.status == 503,
    }
    return [name for name, holds in right.items() if not holds]


def kill(ranks: Ranks) -> None:
    """Kill rank 1."""
    ranks.processes[1].kill()


def silence(ranks: Ranks) -> None:
    """Stop rank 1 without ending it."""
    ranks.processes[1].send_signal(signal.SIGSTOP)


def main() -> int:
    """Compare, then lose a rank in every way, and print the broken promises."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--rank-timeout", type=float, default=3.0, help="seconds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        settings = write_settings(Path(name), arguments.rank_timeout)
        with running_ranks(settings) as ranks:
            broken = [f"{count} answers differ"] if (count := same_answers(ranks.server, arguments.prompts)) else []
            ranks.server.stop()
            eventually(lambda: ranks.processes[1].poll() is not None)
            print(f"stopped: rank 1 ended with status {ranks.processes[1].returncode}")
        for key in UNSHARDED:
            for remove in (kill, silence):
                with running_ranks(settings) as ranks:
                    print(f"{key}: {remove.__name__} rank 1 in the middle of {AT_ONCE} streams", flush=True)
                    broken += lose_rank(ranks, key, partial(remove, ranks), 2 * arguments.rank_timeout)
                    broken += after_loss(ranks)
    print(f"broken: {broken}" if broken else "All promises were kept.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
