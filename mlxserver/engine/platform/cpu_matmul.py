"""A weight times few rows, on a Linux CPU, as many small products.

OpenBLAS puts all of a weight into an order of its own before it multiplies, however few rows there are. Products small
enough (its "small matrix" kernels, for CPUs with AVX-512) it does without, on one core. A step of one row read weights
at 13 GB/s on two cores that can copy 34, and reads them at 25 in pieces on one; up to eight rows pieces are no slower,
and the other core is left to another model.

Rule 1: install() puts these in the place of MLX's layers' own, where OpenBLAS has such kernels and few threads.
Rule 2: a piece is some of the outputs with all of the inputs: weights stay as they are, and nothing is added up anew.
"""

from __future__ import annotations

import functools

from mlxserver.engine.mlx import mx

import mlx.nn as nn

from mlxserver.engine.platform import openblas

MOST_ROWS = 8
# What OpenBLAS takes for small, as of 0.3.21: outputs of one product, and multiplications in it.
MOST_OUTPUTS, MOST_WORK = 1200, 1_000_000
# Outputs in a piece and row: fewer cost more calls than they are worth, and more gain nothing.
_LEAST_PIECE, _MOST_PIECE = 8, 64
# One core with pieces reads about as fast as four without.
_MOST_THREADS = 4

_mlx_linear = nn.Linear.__call__
_mlx_as_linear = nn.Embedding.as_linear


def install() -> None:
    """Use these products in this process if they are faster in it."""
    if openblas.has_small_products() and openblas.threads() <= _MOST_THREADS:
        nn.Linear.__call__ = linear
        nn.Embedding.as_linear = as_linear


def linear(layer: nn.Linear, x: mx.array) -> mx.array:
    """As nn.Linear: x [..., in] -> [..., out]."""
    product = _in_pieces(x, layer["weight"])
    if product is None:
        plain: mx.array = _mlx_linear(layer, x)
        return plain
    return product + layer["bias"] if "bias" in layer else product


def as_linear(layer: nn.Embedding, x: mx.array) -> mx.array:
    """As nn.Embedding.as_linear: x [..., dim] -> [..., vocab]."""
    product = _in_pieces(x, layer["weight"])
    if product is None:
        plain: mx.array = _mlx_as_linear(layer, x)
        return plain
    return product


def _in_pieces(x: mx.array, weight: mx.array) -> mx.array | None:
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
