"""Models whose answers depended on how a prompt is divided into chunks."""

import random

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm.models import phi3small

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading.chunk_masks import BlockSparseAttention, correct_chunk_masks
from tools.zoo import models

PROMPT = 100  # tokens; windows have 32
SPARSE = {"blocksparse_block_size": 32, "blocksparse_num_local_blocks": 1, "blocksparse_vert_stride": 2}


def logits(model, *lengths):
    """Those of the last token behind chunks of so many tokens."""
    tokens = random.Random(1).choices(range(2, models.VOCAB), k=PROMPT)
    cache, done = caches.new_cache(model), 0
    for length in lengths:
        model(mx.array([tokens[done : done + length]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        done += length
    last = model(mx.array([tokens[done:]]), cache=cache)[0, -1]
    return last[mx.arange(models.VOCAB)]


@pytest.mark.parametrize("name", ["phi3small", "plamo3"])
def test_an_answer_is_the_same_however_the_prompt_is_divided(name, monkeypatch):
    monkeypatch.setattr(models, "config", lambda name, plain=models.config: plain(name) | SPARSE)
    model = models.build(name)
    assert not mx.allclose(logits(model, 99), logits(model, 37, 40, 22), atol=1e-4)
    correct_chunk_masks(model)
    whole = logits(model, 99)
    for lengths in ((), (37, 40, 22), (64, 35), (1, 98), (50, 20, 29)):
        assert mx.allclose(whole, logits(model, *lengths), atol=1e-4), lengths


def test_a_query_attends_to_its_own_block_and_every_nth_before_it():
    config = models.config("phi3small") | SPARSE
    layer = phi3small.Attention(phi3small.ModelArgs.from_dict(config), 0)
    layer.__class__ = BlockSparseAttention
    visible = layer._visible(2, 100)  # positions 98 and 99, in block 3
    for head, n in ((0, 0), (0, 1), (1, 0), (1, 1)):
        attended = [key <= 98 + n and (key // 32 == 3 or (key // 32 + head + 1) % 2 == 0) for key in range(100)]
        assert visible[head, n].tolist() == attended
