"""Measurement of the device in a few seconds: how fast it multiplies matrices, and how fast it reads memory.

A prompt is bound by the one, decoding by the other: each token reads all weights once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import device

SECONDS = 2.0  # that each of the two gets
WIDTHS = {"cpu": 1024, "metal": 2048, "cuda": 4096}  # of the matrices that are multiplied
READ_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Rates:
    """flops: operations per second in a product of matrices. read_bytes: bytes per second in one with a vector."""

    flops: float
    read_bytes: float


def measure(seconds: float = SECONDS) -> Rates:
    """The rates of the device, in the type that weights have on it."""
    kind = device.describe().kind
    dtype = mx.float32 if kind == "cpu" else mx.bfloat16
    width = WIDTHS[kind]
    square = mx.ones((width, width), dtype=dtype)
    rows = READ_BYTES // (width * dtype.size)
    tall, vector = mx.ones((rows, width), dtype=dtype), mx.ones((width, 1), dtype=dtype)
    products = _per_second(lambda: square @ square, seconds)
    reads = _per_second(lambda: tall @ vector, seconds)
    return Rates(products * 2 * width**3, reads * rows * width * dtype.size)


def _per_second(compute: Callable[[], mx.array], seconds: float) -> float:
    """How often per second it is computed, without the first time."""
    mx.eval(compute())
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or not count:
        mx.eval(compute())
        count += 1
    return count / spent if spent else float(count)
