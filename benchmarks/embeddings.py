"""Embeddings: tokens per second of many clients against sentence-transformers, and a text stream beside them.

Both embed the same texts with the same weights on the same machine, in turns, so that a machine that is slow for a
while is slow for both; a figure is the ratio within one round. The reference has all texts at once and no network; the
server has them over HTTP, some per request, from many clients.

python -m benchmarks.embeddings --reference PYTHON [--texts 1000] [--clients 16] [--per-request 1,8,64] [--out FILE]

PYTHON is the interpreter of an environment that has sentence-transformers; without it only the server is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.machine import read_machine
from benchmarks.worker import Worker
from mlxserver.engine.loading import sources
from tools.harness.running_server import RunningServer, running_server

MODEL, TALKER = "minilm", "smollm2"
SHORTEST, LONGEST = 20, 200  # tokens of a text
LIMIT = 600.0  # seconds
STALL_TARGET = 0.25  # seconds, the server's default
STREAM = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 512}
RATIO_TARGET = 1.0  # least, of the reference
REFERENCE = """
import json, sys, time
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1])
model.max_seq_length = 512
print(0.0, flush=True)
for line in sys.stdin:
    texts = json.loads(line)
    started = time.perf_counter()
    model.encode(texts, batch_size=int(sys.argv[2]), show_progress_bar=False)
    print(time.perf_counter() - started, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens per second of one round. reference: None where there is none."""

    per_request: int
    ours: float
    reference: float | None

    @property
    def ratio(self) -> float | None:
        """The server's rate as a multiple of the reference's."""
        return self.ours / self.reference if self.reference else None


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between the tokens of a text stream."""

    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Gaps:
        """From the times of the tokens."""
        gaps = sorted(after - before for before, after in pairwise(times))
        return cls(median(gaps), gaps[int(0.99 * (len(gaps) - 1))], gaps[-1])


class Reference(Worker):
    """sentence-transformers of another environment, with the same weights. python: its interpreter.

    Raises ServerFailed if it does not start.
    """

    def __init__(self, python: str, model: Path, batch: int) -> None:
        command = [python, "-c", REFERENCE, str(model), str(batch)]
        super().__init__("sentence-transformers", command, {**os.environ, "HF_HUB_OFFLINE": "1"})

    def seconds(self, texts: Sequence[str], limit: float = LIMIT) -> float:
        """What it takes for all texts. Raises TimeoutError."""
        return float(self.ask(texts, limit))


def make_texts(model: Path, count: int) -> tuple[list[str], int]:
    """Texts of words that are one token each, and the tokens of all of them; always the same."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
    draw = random.Random(0)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(count)]
    return [" ".join(draw.choices(words, k=length - 2)) for length in lengths], sum(lengths)


def embed_all(port: int, texts: Sequence[str], clients: int, per_request: int, model: str = MODEL) -> tuple[float, int]:
    """Seconds until all texts are embedded by so many clients, and their tokens as the server counts them."""
    waiting = iter([texts[n : n + per_request] for n in range(0, len(texts), per_request)])
    lock = threading.Lock()

    def take() -> Sequence[str] | None:
        with lock:
            return next(waiting, None)

    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        tokens = sum(pool.map(lambda _: _embed(port, model, take), range(clients)))
        return time.perf_counter() - started, tokens


def _embed(port: int, model: str, take: Callable[[], Sequence[str] | None]) -> int:
    """One client: requests on one connection until no text is left; the number of tokens."""
    connection, tokens = HTTPConnection("127.0.0.1", port, timeout=LIMIT), 0
    while batch := take():
        body = json.dumps({"model": model, "input": batch, "encoding_format": "base64"})
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(answer.decode(errors="replace"))
        tokens += json.loads(answer)["usage"]["prompt_tokens"]
    connection.close()
    return tokens


@contextmanager
def streaming(server: RunningServer) -> Iterator[list[float]]:
    """The times of the tokens of a text stream that runs during the block."""
    times: list[float] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            with server.stream(TALKER, "Tell a long story.", **STREAM) as stream:  # type: ignore[no-untyped-call]
                for payload in stream:
                    if is_over.is_set():
                        return
                    if payload != "[DONE]" and payload["choices"]:
                        times.append(time.perf_counter())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while len(times) < 2:
            time.sleep(0.05)
        yield times
    finally:
        is_over.set()
        reader.join()


def measure_rounds(options: argparse.Namespace, server: RunningServer, reference: Reference | None) -> list[Round]:
    """Every number of texts per request in every round, each with a run of the reference."""
    texts, tokens = make_texts(sources.resolve(f"embedded:{MODEL}"), options.texts)
    embed_all(server.port, texts[:64], options.clients, 8)
    if reference:
        reference.seconds(texts[:64])
    rounds = []
    for _ in range(options.rounds):
        for per_request in options.per_request:
            theirs = tokens / reference.seconds(texts) if reference else None
            seconds, counted = embed_all(server.port, texts, options.clients, per_request)
            assert counted == tokens, (counted, tokens)
            rounds.append(Round(per_request, tokens / seconds, theirs))
            _print_round(rounds[-1])
    return rounds


def measure_stream(options: argparse.Namespace, server: RunningServer) -> tuple[Gaps, Gaps]:
    """A text stream alone, and beside embeddings."""
    texts, _ = make_texts(sources.resolve(f"embedded:{MODEL}"), options.texts)
    with streaming(server) as times:
        time.sleep(options.alone)
        alone = Gaps.of(times)
        began = len(times)
        embed_all(server.port, texts, options.clients, max(options.per_request))
        return alone, Gaps.of(times[began - 1 :])


def _print_round(measured: Round) -> None:
    ratio = f", {measured.reference:,.0f} of the reference: {measured.ratio:.2f}" if measured.reference else ""
    print(f"{measured.per_request} per request: {measured.ours:,.0f} tokens/s{ratio}", flush=True)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference", default=os.environ.get("REFERENCE_PYTHON"), help="Python that has sentence-transformers"
    )
    parser.add_argument("--batch", type=int, default=32, help="texts that the reference computes at once")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--per-request", type=_numbers, default=(1, 8, 64), help="texts in a request: 1,8,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", type=float, default=10.0, help="seconds of the stream without embeddings")
    parser.add_argument("--no-stream", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    return parser.parse_args()


def main() -> int:
    """Measure, print, and write the figures."""
    options = _options()
    flags = ["--no-defaults", "--model", f"{MODEL}=embedded:{MODEL}", "--model", f"{TALKER}=embedded:{TALKER}"]
    model = sources.resolve(f"embedded:{MODEL}")
    reference = Reference(options.reference, model, options.batch) if options.reference else None
    found: dict[str, object] = {"machine": read_machine()}
    try:
        with running_server(*flags, "--log-level", "warning") as server:
            rounds = measure_rounds(options, server, reference)
            found["rounds"] = [asdict(each) | {"ratio": each.ratio} for each in rounds]
            for per_request in options.per_request if reference else ():
                ratios = [each.ratio for each in rounds if each.per_request == per_request and each.ratio]
                print(f"{per_request} per request: median ratio {median(ratios):.2f}, target: {RATIO_TARGET:g} or more")
            if not options.no_stream:
                alone, beside = measure_stream(options, server)
                found["stream"] = {"alone": asdict(alone), "beside": asdict(beside)}
                for name, gaps in {"alone": alone, "beside": beside}.items():
                    print(f"stream {name}: p50 {1e3 * gaps.p50:.0f} ms, p99 {1e3 * gaps.p99:.0f}, {gaps.longest=:.3f}")
                print(f"p99 beside embeddings is {beside.p99 / STALL_TARGET:.2f} of the stall target; at most 1")
    finally:
        if reference:
            reference.close()
    if options.out:
        options.out.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
