"""What a kernel that draws tokens is compared with: a plain reference, and rows of settings that differ."""

import numpy as np

ONE = np.float32(4294967040.0)
BATCH = 32


def drawn(logits, inverse_temperature, top_p, min_p, top_k, uniform):
    """The token of one row. Weights are integers; ties are kept together."""
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


def impossible_rows():
    """Logits [5, 1000] of rows that have few tokens or none to draw, and the token that each row is to give."""
    logits = np.full((5, 1000), -np.inf, dtype=np.float32)
    logits[1, 7] = np.inf
    logits[2] = np.nan
    logits[3, 3] = 0
    logits[4, 5:7] = 1, np.nan
    return logits, [0, 7, 0, 3, 5]
