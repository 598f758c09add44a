"""CPU matmul: a weight times few rows, or many keys times few queries, on a Linux CPU.

Native kernels read a weight once and where it is, for any number of rows. On one core of an AMD EPYC (AVX2), whose
most is 98 GFLOP/s, one row has 7, four have 28, eight 57, and from sixteen on 80 to 97; with OpenBLAS it is 3, 14, 24,
39 and 81. Without the kernels few rows are many small products:

OpenBLAS copies a weight into another layout before it multiplies, however few rows there are. It does not for products
that are small enough (its "small matrix" kernels, for CPUs with AVX-512), which use one core. A step of one row read
weights at 13 GB/s on two cores that can copy 34, and reads them at 25 in pieces on one; up to eight rows pieces are no
slower, and the other core is left to another model.

Keys and values are multiplied in pieces that stay in a core's cache while OpenBLAS copies them: with those of 6,000
tokens, a step's attention takes two thirds to four fifths of the time, on a CPU without such kernels too.

Rule: a piece is some of the outputs with all of the inputs: weights stay as they are, and nothing is added up anew.
      Values are the exception: their pieces are some of the inputs.
"""

from __future__ import annotations

import functools

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import openblas
from mlxserver.engine.platform.native.extension import native

MOST_ROWS = 8
PIECE = 256  # tokens of keys or values in one small product
_MANY = 8 * PIECE  # tokens from which on keys are better in pieces
# Limits of OpenBLAS's small matrix kernels, as of 0.3.21: outputs of one product, and multiplications in it.
MOST_OUTPUTS, MOST_WORK = 1200, 1_000_000
# Outputs of a piece per row: fewer cost more calls than they save, and more gain nothing.
_LEAST_PIECE, _MOST_PIECE = 8, 64


def has_products() -> bool:
    """Whether some products are faster here than MLX's own."""
    return native() is not None or _has_pieces()


def product(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array | None:
    """x [..., in] times weight [out, in], transposed, plus bias [out]; None where MLX's own product is better."""
    if x.dtype != mx.float32:
        return None
    if kernels := native():
        computed: mx.array | None = kernels.dense(x, weight, bias)
        return computed
    computed = in_pieces(x, weight) if _has_pieces() else None
    return computed if computed is None or bias is None else computed + bias


@functools.cache
def _has_pieces() -> bool:
    return openblas.has_small_products() and openblas.threads() <= openblas.FEW_THREADS


def in_pieces(x: mx.array, weight: mx.array) -> mx.array | None:
    """x [..., in] times weight [out, in], transposed; None where one product is better."""
    outputs, inputs = weight.shape
    rows = x.size // inputs
    if not 0 < rows <= MOST_ROWS or not x.dtype == weight.dtype == mx.float32:
        return None
    size = piece(rows, outputs, inputs)
    if size is None:
        return None
    pieces = weight.reshape(outputs // size, size, inputs).swapaxes(1, 2)
    products = x.reshape(rows, inputs) @ pieces  # [pieces, rows, size]
    return products.swapaxes(0, 1).reshape(*x.shape[:-1], outputs)


@functools.cache
def piece(rows: int, outputs: int, inputs: int) -> int | None:
    """Outputs of a weight in one small product; None if it can't be cut so, or needn't be."""
    most = min(MOST_OUTPUTS // rows, MOST_WORK // (rows * inputs))
    if outputs <= most:
        return None
    sizes = range(min(most, _MOST_PIECE), _LEAST_PIECE - 1, -1)
    return next((size for size in sizes if outputs % size == 0), None)


def whole_pieces(tokens: int) -> int:
    """Tokens to attend to so that their keys can be multiplied in pieces, if they are many."""
    return -(-tokens // PIECE) * PIECE if tokens >= _MANY else tokens


def times_keys(x: mx.array, keys: mx.array) -> mx.array:
    """x [B, heads, rows, dim] times keys [B, heads, T, dim], transposed -> [B, heads, rows, T]."""
    if not _are_many(x, keys):
        return x @ keys.swapaxes(-1, -2)
    products = mx.expand_dims(x, 2) @ mx.unflatten(keys, 2, (-1, PIECE)).swapaxes(-1, -2)
    return products.swapaxes(2, 3).reshape(*x.shape[:3], -1)


def times_values(weights: mx.array, values: mx.array) -> mx.array:
    """weights [B, heads, rows, T] times values [B, heads, T, dim]."""
    if not _are_many(weights, values):
        return weights @ values
    pieces = mx.unflatten(weights, 3, (-1, PIECE)).swapaxes(2, 3)
    return mx.sum(pieces @ mx.unflatten(values, 2, (-1, PIECE)), axis=2)


def _are_many(x: mx.array, array: mx.array) -> bool:
    tokens = array.shape[2]
    is_many = tokens >= _MANY and tokens % PIECE == 0 and x.shape[2] <= MOST_ROWS
    return is_many and openblas.threads() <= openblas.FEW_THREADS
