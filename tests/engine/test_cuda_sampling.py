"""The kernel that draws tokens, against a plain reference. It needs an NVIDIA GPU; elsewhere MLX's functions draw."""

from mlxserver.engine.mlx import mx

import numpy as np
import pytest

from mlxserver.engine.platform import cuda_sampling

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")

ONE = np.float32(4294967040.0)
BATCH = 32


def drawn(logits, inverse_temperature, top_p, min_p, top_k, uniform):
    """The token of one row. All is as the kernel states it: integer weights, ties are kept together."""
    best = int(logits.argmax())
    if inverse_temperature == 0:
        return best
    shares = np.exp((logits - logits[best]) * np.float32(inverse_temperature))
    weights = np.rint(np.minimum(shares, 1) * ONE).astype(np.uint64)
    order = np.sort(weights)[::-1]
    above = np.searchsorted(-order.astype(np.float64), -order.astype(np.float64))  # number of larger weights
    mass_above = np.concatenate([[np.uint64(0)], np.cumsum(order)])[above]
    limit = max(int(np.ceil(float(np.float32(top_p)) * float(weights.sum()))), 1) if top_p < 1 else 2**63
    least = order[(mass_above < limit) & (above < top_k) & (order > 0)].min()
    kept = np.where(weights >= max(int(least), int(np.rint(np.float32(min_p) * ONE)), 1), weights, 0)
    cumulative = np.cumsum(kept)
    target = min(int(float(uniform) * float(cumulative[-1])), int(cumulative[-1]) - 1)
    return int(np.searchsorted(cumulative, target, side="right"))


def rows(vocab):
    """Settings that differ, and extremes: greedy, one token, all tokens; empty, tiny and almost full nuclei."""
    top_k = [vocab, 20, 1, 200]
    settings = [[1 / (0.3 + n / 16), 0.5 + n % 5 / 10, 0.02 * (n % 2), top_k[n % 4]] for n in range(BATCH)]
    settings[7] = [0, 1, 0, vocab]
    settings[8:12] = [[1, top_p, 0, vocab] for top_p in (1.0, 0.999, 1e-9, 0.0)]
    return np.array(settings, dtype=np.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 33, 1000, 49_152, 151_669])
def test_tokens_are_those_of_the_reference_whatever_the_batch(vocab, dtype):
    random = np.random.default_rng(vocab)
    logits = mx.array(random.normal(0, 3, (BATCH, vocab)).astype(np.float32)).astype(dtype)
    settings, uniforms = rows(vocab), random.random((BATCH, 1)).astype(np.float32)
    uniforms[:2, 0] = 0, 1 - 2.0**-20
    tokens = cuda_sampling.draw(logits, mx.array(settings), mx.array(uniforms)).tolist()
    values = np.array(logits.astype(mx.float32))
    wanted = [drawn(values[n], *settings[n], uniforms[n, 0]) for n in range(BATCH)]
    assert sum(token != own for token, own in zip(tokens, wanted, strict=True)) <= 1  # exp() may round otherwise
    some = cuda_sampling.draw(logits[5:9], mx.array(settings[5:9]), mx.array(uniforms[5:9]))
    assert some.tolist() == tokens[5:9]


def test_where_nothing_can_be_drawn_the_token_exists():
    logits = np.full((5, 1000), -np.inf, dtype=np.float32)
    logits[1, 7] = np.inf
    logits[2] = np.nan
    logits[3, 3] = 0
    logits[4, 5:7] = 1, np.nan
    settings = mx.array([[1, 0.9, 0, 1000]] * 5, dtype=mx.float32)
    assert cuda_sampling.draw(mx.array(logits), settings, mx.full((5, 1), 0.5)).tolist() == [0, 7, 0, 3, 5]
