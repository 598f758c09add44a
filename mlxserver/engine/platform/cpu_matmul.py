"""CPU matmul: a weight times few rows, on a Linux CPU, as many small products.

OpenBLAS copies a weight into another layout before it multiplies, however few rows there are. It does not for products
that are small enough (its "small matrix" kernels, for CPUs with AVX-512), which use one core. A step of one row read
weights at 13 GB/s on two cores that can copy 34, and reads them at 25 in pieces on one; up to eight rows pieces are no
slower, and the other core is left to another model.

Rule: a piece is some of the outputs with all of the inputs: weights stay as they are, and nothing is added up anew.
"""

from __future__ import annotations

import functools

from mlxserver.engine.mlx import mx

MOST_ROWS = 8
# Limits of OpenBLAS's small matrix kernels, as of 0.3.21: outputs of one product, and multiplications in it.
MOST_OUTPUTS, MOST_WORK = 1200, 1_000_000
# Outputs of a piece per row: fewer cost more calls than they save, and more gain nothing.
_LEAST_PIECE, _MOST_PIECE = 8, 64


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
