"""Ceiling of the servers: engines in-process, without HTTP, and the limit set by the memory's bandwidth.

A separate process (python -m benchmarks.raw), so that it shares no memory and no BLAS library with the rest. It reads
names of measures as lines of JSON, and answers each with its figures (worker.py).

Rule 1: the load on an engine is the closed loop of a server's load, with prompts of the same length, and its figures
        are those of the same summary.
Rule 2: a loop is run once, shorter, before it is measured first, and with one sequence before it is measured again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import abc, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.loading import loader  # first: this prepares the process for MLX

# isort: split
from mlxserver.engine.mlx import mx

import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.utils import load_tokenizer

from benchmarks.engines import Engine, MlxLmEngine, OurEngine
from benchmarks.machine import has_gpu
from benchmarks.settings import BANDWIDTH, GREEDY, RAW, SAMPLED, Sizes, split_scenario
from benchmarks.stats import decode_rate, summarise
from benchmarks.vocabulary import Prompts
from benchmarks.worker import answer_lines
from mlxserver.client.bench.load import Sample
from mlxserver.client.events import Usage
from mlxserver.client.stats import Timing
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.sequence import Sequence

BANDWIDTH_BYTES = 1 << 28
BANDWIDTH_ROW = 8192
BANDWIDTH_TRIES = 5


def drive(engine: Engine, sequences: abc.Sequence[Sequence], clients: int) -> list[Timing]:
    """Decode all sequences, `clients` at a time. A token's arrival is the end of its step."""
    waiting, timings = deque(sequences), []
    running: dict[int, tuple[float, Sequence, list[float]]] = {}
    while waiting or running:
        while waiting and len(running) < clients:
            sequence = waiting.popleft()
            running[sequence.id] = perf_counter(), sequence, []
            engine.insert(sequence)
        advanced, now = engine.step(), perf_counter()
        for sequence_id in advanced:
            start, sequence, arrivals = running[sequence_id]
            arrivals.append(now)
            if len(arrivals) == sequence.max_tokens:
                del running[sequence_id]
                engine.remove(sequence_id)
                timings.append(Timing(start, now, tuple(arrivals), usage=Usage(completion_tokens=len(arrivals))))
    return timings


class SequenceMaker:
    """Maker of sequences as a server would prepare them: chats with distinct prompts, in the model's template."""

    def __init__(self, directory: Path, tokenizer: Any, sizes: Sizes, name: str) -> None:
        self._prompts = Prompts(directory, name)
        self._tokenizer = tokenizer
        self._length = sizes.prompt_tokens

    def make(self, count: int, settings: Callable[[int], SamplingParams], max_tokens: int) -> list[Sequence]:
        """`count` sequences. settings: the sampling of each by its number."""
        return [Sequence(number, self._prompt(), settings(number), max_tokens) for number in range(count)]

    def _prompt(self) -> tuple[int, ...]:
        messages = [{"role": "user", "content": self._prompts.make(self._length)}]
        return tuple(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def distinct_sampling(number: int) -> SamplingParams:
    """SamplingParams settings that differ between any two of 32 sequences."""
    return SamplingParams(
        temperature=0.5 + number / 40,
        top_p=0.8 + number % 5 / 25,
        top_k=20 * (number % 3),
        min_p=0.02 * (number % 2),
        seed=number,
    )


SAMPLING: abc.Mapping[str, Callable[[int], SamplingParams]] = {
    "greedy": lambda _: SamplingParams(**GREEDY),
    "greedy batch": lambda _: SamplingParams(**GREEDY),
    "sampled": lambda _: SamplingParams(**SAMPLED),
    "sampler a row": lambda _: SamplingParams(**SAMPLED),
    "distinct batch": distinct_sampling,
}


def measure_engine(
    make: Callable[[], Engine],
    maker: SequenceMaker,
    sizes: Sizes,
    settings: Callable[[int], SamplingParams],
    clients: int,
    requests_per_client: int,
    first: bool,
) -> dict[str, float]:
    """The figures of one engine in a closed loop, and the rate of its decode steps with all clients."""
    engine = make()
    try:
        drive(engine, maker.make(clients if first else 1, settings, sizes.warmup_tokens), clients)
        timings = drive(engine, maker.make(clients * requests_per_client, settings, sizes.max_tokens), clients)
    finally:
        engine.close()
    figures = summarise(list(map(Sample, timings))).figures()
    return {**figures, "decode_tokens_per_second": decode_rate(timings, clients)}


def measure_bandwidth() -> float:
    """Bandwidth of the device's memory in bytes/s: the best of a copy, a sum and a product with a vector."""
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
    """Bytes of the weights that a decode step reads. An embedding that is no output layer is read one row per token."""
    skip = () if tied else ("model.embed_tokens.",)
    return sum(array.nbytes for name, array in tree_flatten(model.parameters()) if not name.startswith(skip))


class Measures:
    """All measures of a model by part and scenario, each with the figures of one round."""

    def __init__(self, directory: Path, sizes: Sizes) -> None:
        self._directory, self._sizes = directory, sizes
        self._measured: set[tuple[str, str]] = set()

    @cached_property
    def _theirs(self) -> tuple[Any, Any, dict[str, Any]]:
        model, tokenizer, config = load(str(self._directory), return_config=True)
        return model, tokenizer, config

    @cached_property
    def _ours(self) -> Any:
        spec = ModelSpec("raw", str(self._directory))
        return loader.load(replace(spec, weights="bfloat16") if estimate(spec).widened else spec).model

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._directory)

    def figures(self, part: str, scenario: str, number: int) -> dict[str, float]:
        """The figures of a scenario in a round. Raises KeyError for one that does not exist."""
        if scenario == BANDWIDTH:
            return self._bandwidth()
        kind, clients = split_scenario(scenario)
        sizes, first = self._sizes, (part, scenario) not in self._measured
        self._measured.add((part, scenario))
        maker = SequenceMaker(self._directory, self._tokenizer, sizes, f"{scenario} {number}")
        each = sizes.requests_per_client if kind == "sampled" and part == RAW else 1
        return measure_engine(self._engine(part, kind, clients), maker, sizes, SAMPLING[kind], clients, each, first)

    def _engine(self, part: str, kind: str, clients: int) -> Callable[[], Engine]:
        if part == RAW:
            return lambda: OurEngine(self._ours, clients)
        return lambda: MlxLmEngine(self._theirs[0], clients, shared=kind != "sampler a row")

    def _bandwidth(self) -> dict[str, float]:
        model, _, config = self._theirs
        read = weight_bytes(model, bool(config.get("tie_word_embeddings", True)))
        bandwidth = measure_bandwidth()
        rate = self._sizes.peak * bandwidth / read
        return {"bytes_per_second": bandwidth, "weight_bytes": float(read), "tokens_per_second": rate}


def main() -> None:
    """Answer with figures of one model directory until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="MLX directory")
    parser.add_argument("--sizes", type=json.loads, required=True, help="the fields of Sizes as JSON")
    arguments = parser.parse_args()
    sizes = Sizes(**{**arguments.sizes, "concurrency": tuple(arguments.sizes["concurrency"])})
    measures = Measures(arguments.model, sizes)
    answer_lines(lambda question: measures.figures(*question))


if __name__ == "__main__":
    main()
