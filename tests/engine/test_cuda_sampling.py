"""The kernel that draws tokens, against a plain reference. It needs an NVIDIA GPU; test_cpu_sampling.py has a CPU's."""

from mlxserver.engine.mlx import mx

import numpy as np
import pytest

from mlxserver.engine.platform import cuda_sampling
from tests.support.draws import BATCH, drawn, impossible_rows, rows

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")


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
    logits, wanted = impossible_rows()
    settings = mx.array([[1, 0.9, 0, 1000]] * 5, dtype=mx.float32)
    assert cuda_sampling.draw(mx.array(logits), settings, mx.full((5, 1), 0.5)).tolist() == wanted
