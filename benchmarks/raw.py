"""The ceiling: engines in-process, without HTTP, and the limit that the memory's bandwidth sets.

Run as a process of its own (python -m benchmarks.raw), so that its memory and its BLAS library are its own.

Rule 1: an engine is driven by the same closed loop as a server, with prompts as long as there, and its figures are
        computed by the same summary.
Rule 2: a loop is run once, shorter, before it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import abc, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from mlxserver.engine.loading import loader  # first: this prepares the process for MLX

# isort: split
from mlxserver.engine.mlx import mx

import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load

from benchmarks.engines import Engine, MlxLmEngine, OurEngine
from benchmarks.machine import has_gpu
from benchmarks.settings import GREEDY, SAMPLED, Sizes
from benchmarks.stats import Record, decode_rate, summarise
from benchmarks.vocabulary import Prompts
from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.sequence import Sequence

BANDWIDTH_BYTES = 1 << 28
BANDWIDTH_ROW = 8192
BANDWIDTH_TRIES = 5


def drive(engine: Engine, rows: abc.Sequence[Sequence], clients: int) -> list[Record]:
    """Decode all rows, `clients` at a time; the arrivals are the steps that gave each token."""
    waiting, records = deque(rows), []
    running: dict[int, tuple[float, Sequence, list[float]]] = {}
    while waiting or running:
        while waiting and len(running) < clients:
            row = waiting.popleft()
            running[row.id] = perf_counter(), row, []
            engine.insert(row)
        advanced, now = engine.step(), perf_counter()
        for sequence_id in advanced:
            sent, row, arrivals = running[sequence_id]
            arrivals.append(now)
            if len(arrivals) == row.max_tokens:
                del running[sequence_id]
                engine.remove(sequence_id)
                records.append(Record(sent, now, tuple(arrivals), len(arrivals)))
    return records


class Rows:
    """Makes rows as a server would: from chats with distinct prompts, in the model's template."""

    def __init__(self, directory: Path, tokenizer: Any, sizes: Sizes) -> None:
        self._prompts = Prompts(directory)
        self._tokenizer = tokenizer
        self._length = sizes.prompt_tokens

    def make(self, count: int, settings: Callable[[int], SamplingParams], max_tokens: int) -> list[Sequence]:
        """So many; settings gives each row's by its number."""
        return [Sequence(number, self._prompt(), settings(number), max_tokens) for number in range(count)]

    def _prompt(self) -> tuple[int, ...]:
        messages = [{"role": "user", "content": self._prompts.make(self._length)}]
        return tuple(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def distinct_sampling(number: int) -> SamplingParams:
    """Settings of which no two of 32 rows have the same."""
    return SamplingParams(
        temperature=0.5 + number / 40,
        top_p=0.8 + number % 5 / 25,
        top_k=20 * (number % 3),
        min_p=0.02 * (number % 2),
        seed=number,
    )


def measure_engine(
    make: Callable[[], Engine],
    rows: Rows,
    sizes: Sizes,
    settings: Callable[[int], SamplingParams],
    clients: int,
    rounds: int,
) -> dict[str, float]:
    """The figures of one engine in a closed loop, with the rate of its full decode steps."""
    engine = make()
    try:
        drive(engine, rows.make(clients, settings, sizes.warmup_tokens), clients)
        records = drive(engine, rows.make(clients * rounds, settings, sizes.max_tokens), clients)
    finally:
        engine.close()
    return {**summarise(records).figures(), "decode_tokens_per_second": decode_rate(records, clients)}


def measure_bandwidth() -> float:
    """Bytes/s of the device's memory: the best of a copy, a sum and a product with a vector."""
    matrix = mx.random.normal((BANDWIDTH_BYTES // 4 // BANDWIDTH_ROW, BANDWIDTH_ROW))
    vector = mx.random.normal((1, len(matrix)))
    mx.eval(matrix, vector)
    moves: list[tuple[int, Callable[[], object]]] = [
        (2 * matrix.nbytes, lambda: mx.eval(matrix + 1)),
        (matrix.nbytes, lambda: mx.eval(matrix.sum())),
        (matrix.nbytes, lambda: mx.eval(vector @ matrix)),
    ]
    # On a CPU one MLX operation runs on one core, which does not fill the memory's bandwidth.
    if not has_gpu():
        moves.append((2 * BANDWIDTH_BYTES, _all_cores_copy()))
    return max(moved / _shortest(act) for moved, act in moves)


def _all_cores_copy() -> Callable[[], object]:
    cores = os.cpu_count() or 1
    sources = [np.ones(BANDWIDTH_BYTES // 8 // cores) for _ in range(cores)]
    targets = [np.zeros_like(source) for source in sources]
    pool = ThreadPoolExecutor(cores)
    return lambda: list(pool.map(np.copyto, targets, sources))


def _shortest(act: Callable[[], object]) -> float:
    times = []
    for _ in range(BANDWIDTH_TRIES):
        begun = perf_counter()
        act()
        times.append(perf_counter() - begun)
    return min(times)


def weight_bytes(model: Any, tied: bool) -> int:
    """What a decode step reads of the weights. An embedding that is no output layer gives only a row a token."""
    skip = () if tied else ("model.embed_tokens.",)
    return sum(array.nbytes for name, array in tree_flatten(model.parameters()) if not name.startswith(skip))


def measure_ceiling(directory: Path, sizes: Sizes) -> dict[str, dict[str, float]]:
    """All figures by name."""
    model, tokenizer, config = load(str(directory), return_config=True)
    rows, peak, batch = Rows(directory, tokenizer, sizes), sizes.peak, sizes.raw_batch
    read = weight_bytes(model, bool(config.get("tie_word_embeddings", True)))

    def figures(
        make: Callable[[], Engine], settings: Callable[[int], SamplingParams], clients: int, rounds: int = 1
    ) -> dict[str, float]:
        return measure_engine(make, rows, sizes, settings, clients, rounds)

    def greedy(_: int) -> SamplingParams:
        return SamplingParams(**GREEDY)

    def sampled(_: int) -> SamplingParams:
        return SamplingParams(**SAMPLED)

    results = {
        "mlx-lm greedy": figures(lambda: MlxLmEngine(model, peak, shared=True), greedy, peak),
        "mlx-lm one sampler": figures(lambda: MlxLmEngine(model, peak, shared=True), sampled, peak),
        "mlx-lm sampler a row": figures(lambda: MlxLmEngine(model, peak, shared=False), sampled, peak),
    }
    model = loader.load(ModelSpec("raw", str(directory))).model
    results |= {
        "ours sampled": figures(lambda: OurEngine(model, peak), sampled, peak, sizes.rounds),
        "ours greedy, full batch": figures(lambda: OurEngine(model, batch), greedy, batch),
        "ours distinct, full batch": figures(lambda: OurEngine(model, batch), distinct_sampling, batch),
    }
    bandwidth = measure_bandwidth()
    limit = {"bytes_per_second": bandwidth, "weight_bytes": float(read), "tokens_per_second": peak * bandwidth / read}
    return {**results, "bandwidth": limit}


def main() -> None:
    """Measure the ceiling for one model directory and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="MLX directory")
    parser.add_argument("--sizes", type=json.loads, required=True, help="the fields of Sizes as JSON")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    sizes = Sizes(**{**arguments.sizes, "concurrency": tuple(arguments.sizes["concurrency"])})
    arguments.out.write_text(json.dumps(measure_ceiling(arguments.model, sizes)), encoding="utf-8")


if __name__ == "__main__":
    main()
