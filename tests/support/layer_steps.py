"""Logits of a model whose layers are computed otherwise, over the kinds of steps that a batch of slots has."""

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.slot_cache import SlotCache


def filled(model, length):
    """The cache of a prompt of so many tokens."""
    cache = caches.new_cache(model)
    model(mx.array([[(3 * n + length) % 300 for n in range(length)]]), cache=cache)
    return cache


def steps(model, lengths, policy=None, verified=3):
    """Logits of three steps of sequences of these lengths, of one that verifies tokens, and of one after it."""
    batch, logits = SlotCache(model, policy), []
    batch.join([filled(model, length) for length in lengths])
    for step in range(3):
        logits.append(batch.advance(mx.array([(5 * n + step) % 300 for n in range(len(lengths))], dtype=mx.uint32)))
    drafted = mx.array([[n + k for k in range(verified)] for n in range(len(lengths))], dtype=mx.uint32)
    batch.make_room(verified)
    logits.append(batch.verify(drafted))
    batch.rewind([n % verified for n in range(len(lengths))])
    logits.append(batch.advance(mx.array([7] * len(lengths), dtype=mx.uint32)))
    mx.eval(logits)
    return logits
