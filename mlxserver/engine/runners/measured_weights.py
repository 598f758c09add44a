"""Measurement of the weights' format: quantized products as stored are timed beside those of 16 bits, in idle moments.

There is no memory for a model in both formats. So the products of each shape are timed alone, for one token, for
several, and for a chunk of a prompt, with weights that mean nothing, and are added up as often as a step has them.
Which format the model is loaded in makes no difference. The next load of this shape has what was faster
(loading/estimate.py), where memory allows it.

Rule 1: a step is the products of one shape in one format. Nothing is held between steps.
Rule 2: its memory is borrowed. Without it, and where 16 bits are faster now and then, another load measures anew.
Rule 3: 16 bits count as failed while products of a shape are computed for the first time (measured_policies.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from mlxserver.engine.mlx import mx

from mlxserver.engine.errors import one_line
from mlxserver.engine.loading.kept_choices import WEIGHTS
from mlxserver.engine.loading.quantized_products import QuantizedProduct
from mlxserver.engine.platform import device
from mlxserver.engine.runners.measured_policies import LEAST_SPEEDUP, ROUNDS, Borrowing, Result, is_steady, speedup
from mlxserver.engine.worker.runner import PAUSE

log = logging.getLogger("engine")

TOKENS = (1, 8, 64)
_READ = 256 << 20  # bytes as stored that are read before the same ones are again: a step reads all weights once
_MOST_WEIGHTS = 128  # of a product: smaller ones are bound by the host
_SECONDS, _MOST_PASSES = 0.05, 16  # of a sample
_SORTED = 64  # rows from which mlx-lm's expert layers sort them by expert
_SCALE = 96  # of a byte: any that is no NaN

Weights = Mapping[str, mx.array]


class WeightMeasurement:
    """Measurement of one model's products. The other arguments are those of Measurement."""

    def __init__(
        self,
        key: str,
        products: Mapping[QuantizedProduct, int],
        *,
        borrowing: Borrowing,
        is_quiet: Callable[[], bool],
        keep: Callable[[Result], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._key = key
        self._products = products
        self._borrowing = borrowing
        self._is_quiet = is_quiet
        self._keep = keep
        self._clock = clock
        self._stored_bytes = sum(count * product.bytes(is_wide=False) for product, count in products.items())
        self._begun: set[tuple[QuantizedProduct, bool]] = set()

    def steps(self) -> Iterator[object]:
        """Take the samples, one per step, and keep the result. Each step gives the format, or PAUSE."""
        rounds: dict[bool, list[list[float]]] = {False: [], True: []}  # seconds in 16 bits or not, by [round][tokens]
        try:
            for _ in range(ROUNDS):
                for own in rounds.values():
                    own.append([0.0] * len(TOKENS))
                for product, count in self._products.items():
                    for is_wide, own in rounds.items():
                        if (seconds := (yield from self._timed(product, is_wide))) is None:
                            return
                        own[-1] = [total + count * each for total, each in zip(own[-1], seconds, strict=True)]
        except Exception as error:  # of any kind: it is foreign code, and may have no memory
            log.warning("%s: %s is dropped: %s: %s", self._key, WEIGHTS, type(error).__name__, one_line(error))
            self._keep(Result({}, {WEIGHTS: 0.0}))
            device.clear_cache()
        else:
            self._choose(*([*zip(*own, strict=True)] for own in rounds.values()))

    def _choose(self, stored: Sequence[Sequence[float]], wide: Sequence[Sequence[float]]) -> None:
        """Keep which format is faster: 16 bits, which take more memory, by a margin. Seconds by [tokens][round]."""
        ratio = speedup(stored, wide)
        is_faster = ratio >= LEAST_SPEEDUP
        if is_faster and not is_steady(stored, wide):
            log.info("%s: %s varies too much: %.2f times as fast", self._key, WEIGHTS, ratio)
            return
        log.info("%s: products of 16 bits are %.2f times as fast as those of quantized weights", self._key, ratio)
        self._keep(Result({WEIGHTS: is_faster}, {WEIGHTS: ratio if is_faster else 1 / max(ratio, 1e-9)}))

    def _timed(self, product: QuantizedProduct, is_wide: bool) -> Generator[object, None, list[float] | None]:
        """Seconds of a sample, taken while nothing else computes; None where its memory is not there."""
        while True:
            is_first = (product, is_wide) not in self._begun
            if is_first:
                self._begun.add((product, is_wide))
                self._keep(Result({}, {WEIGHTS: 0.0}))
            seconds = self._sample(product, is_wide)
            if is_first:
                self._keep(Result({}, {}))
            if seconds is None:
                return None
            is_quiet = self._is_quiet()
            yield ("16 bits" if is_wide else "stored") if is_quiet else PAUSE
            if is_quiet:
                return seconds

    def _sample(self, product: QuantizedProduct, is_wide: bool) -> list[float] | None:
        """Seconds per product, by number of tokens."""
        read, size = min(_READ, self._stored_bytes), product.bytes(is_wide=False)
        number = min(-(-read // size), _MOST_WEIGHTS)
        with self._borrowing(number * product.bytes(is_wide)) as is_granted:
            if not is_granted:
                return None
            try:
                return self._times(product, is_wide, number)
            finally:
                device.clear_cache()

    def _times(self, product: QuantizedProduct, is_wide: bool, number: int) -> list[float]:
        weights = [_weights(product, is_wide) for _ in range(number)]
        return [self._seconds(product, weights, tokens) / number for tokens in TOKENS]

    def _seconds(self, product: QuantizedProduct, weights: Sequence[Weights], tokens: int) -> float:
        """Seconds of a product with each of the weights, behind a first one that is not timed."""
        mx.eval(_chain(product, weights, tokens))
        alone = self._clocked(product, weights, tokens)
        passes = min(_MOST_PASSES, int(_SECONDS / max(alone, 1e-6)))
        return self._clocked(product, [*weights] * passes, tokens) / passes if passes else alone

    def _clocked(self, product: QuantizedProduct, weights: Sequence[Weights], tokens: int) -> float:
        result = _chain(product, weights, tokens)  # without Python's part, which compiled steps do not have
        started = self._clock()
        mx.eval(result)
        return self._clock() - started


def _weights(product: QuantizedProduct, is_wide: bool) -> Weights:
    """Weights of a product, evaluated. All rows are alike."""
    made = {name: _filled(shape, dtype) for name, shape, dtype in product.arrays_of(is_wide)}
    mx.eval(made)
    return made


def _filled(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    key = mx.random.key(0)
    if dtype == mx.uint8:
        row = mx.full(shape[-1:], _SCALE, dtype)
    elif dtype == mx.uint32:
        row = mx.random.randint(0, (1 << 31) - 1, shape[-1:], dtype, key=key)
    else:
        row = (0.02 * mx.random.normal(shape[-1:], key=key)).astype(dtype)
    return mx.contiguous(mx.broadcast_to(row, shape))


def _chain(product: QuantizedProduct, weights: Sequence[Weights], tokens: int) -> mx.array:
    """Products one behind the other, each of which waits for the one before, as in a model; nothing is computed."""
    inputs = _filled((tokens, product.shape[-1]), product.half)
    chosen: list[mx.array | None] = [None] * len(weights)
    is_sorted = tokens * product.active >= _SORTED
    if product.active:
        inputs = mx.repeat(inputs, product.active, 0)[:, None] if is_sorted else inputs[:, None, None]
        chosen = [_experts(product, tokens, number, is_sorted) for number in range(len(weights))]
    mx.eval(inputs, chosen)
    result = inputs
    for number, own in enumerate(weights):
        each = inputs + result.reshape(-1)[:1] if number else inputs
        result = _product(product, each, own, chosen[number], is_sorted)
    return result


def _experts(product: QuantizedProduct, tokens: int, seed: int, is_sorted: bool) -> mx.array:
    """Experts that tokens meet [tokens, active], or all of them in order."""
    found = mx.random.randint(0, product.shape[0], (tokens, product.active), key=mx.random.key(seed))
    return mx.sort(found.flatten()) if is_sorted else found


def _product(
    product: QuantizedProduct, x: mx.array, weights: Weights, experts: mx.array | None, is_sorted: bool
) -> mx.array:
    """As MLX's and mlx-lm's layers compute it."""
    weight = weights["weight"]
    if "scales" not in weights:
        if experts is None:
            return x @ weight.T
        return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=is_sorted)
    bits, group_size, mode = product.bits, product.group_size, product.mode
    scales, biases, largest = weights["scales"], weights.get("biases"), weights.get("global_scale")
    if experts is None:
        return mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    return mx.gather_qmm(
        x,
        weight,
        scales,
        biases,
        rhs_indices=experts,
        group_size=group_size,
        bits=bits,
        mode=mode,
        global_scale=largest,
        sorted_indices=is_sorted,
    )
