"""Native kernels of sampling, against plain references and against what is sampled without them."""

from mlxserver.engine.mlx import mx

import numpy as np
import pytest

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.platform import sampling_kernels
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.sampling.draw import ArrayDraw, KernelDraw
from tests.support.draws import BATCH, drawn, impossible_rows, rows

pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels are not built")
LEVELS = pytest.mark.parametrize("level", native().levels() if native() else [])


def normal(vocab, scale=3, batch=BATCH):
    return np.random.default_rng(vocab).normal(0, scale, (batch, vocab)).astype(np.float32)


def uniform(batch=BATCH):
    return np.random.default_rng(batch).random((batch, 1)).astype(np.float32)


def draw(logits, settings, uniforms, level=""):
    return native().draw(mx.array(logits), mx.array(settings), mx.array(uniforms), level).tolist()


@LEVELS
@pytest.mark.parametrize("scale", [0.1, 3, 20])
@pytest.mark.parametrize("vocab", [1, 33, 1000, 49_152, 151_669])
def test_tokens_are_those_of_the_reference_whatever_the_batch(vocab, scale, level):
    logits, settings, uniforms = normal(vocab, scale), rows(vocab), uniform()
    uniforms[:2, 0] = 0, 1 - 2.0**-20
    tokens = draw(logits, settings, uniforms, level)
    wanted = [drawn(logits[n], *settings[n], uniforms[n, 0]) for n in range(BATCH)]
    assert sum(token != own for token, own in zip(tokens, wanted, strict=True)) <= 1  # sums round otherwise
    assert draw(logits[5:9], settings[5:9], uniforms[5:9], level) == tokens[5:9]


@LEVELS
def test_where_nothing_can_be_drawn_the_token_exists(level):
    logits, wanted = impossible_rows()
    assert draw(logits, np.float32([[1, 0.9, 0, 1000]] * 5), uniform(5), level) == wanted
    assert draw(logits, np.float32([[0, 1, 0, 1000]] * 5), uniform(5), level) == wanted
    assert native().argmax(mx.array(logits), level).tolist() == wanted


@LEVELS
@pytest.mark.parametrize("top_k", [1, 300, 5000])
def test_equal_logits_are_kept_together(top_k, level):
    """top_k counts the tokens above: of 20,000 equal ones all may be drawn, of two thousand smaller ones none."""
    logits = np.zeros((1, 22_000), dtype=np.float32)
    logits[:, 1::11] = -1
    settings, uniforms = np.float32([[1, 1, 0, top_k]] * 500), uniform(500)
    tokens = np.array(draw(np.repeat(logits, 500, axis=0), settings, uniforms, level))
    assert (logits[0, tokens] == 0).all()
    assert (tokens == np.flatnonzero(logits[0] == 0)[(uniforms[:, 0] * 20_000).astype(int)]).mean() > 0.99


@LEVELS
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_nucleus_among_logits_that_hardly_differ_is_exact(share, level):
    logits = (np.random.default_rng(1).permutation(40_000) * 1e-6).astype(np.float32)
    uniforms = np.linspace(0, 0.999, 64, dtype=np.float32)[:, None]
    tokens = draw(np.tile(logits, (64, 1)), np.float32([[1, share, 0, 40_000]] * 64), uniforms, level)
    weights = np.exp(logits.astype(np.float64))
    order = np.argsort(-weights, kind="stable")
    nucleus = np.sort(order[: 1 + np.searchsorted(np.cumsum(weights[order]), share * weights.sum())])
    expected = np.searchsorted(np.cumsum(weights[nucleus]), uniforms[:, 0] * weights[nucleus].sum(), side="right")
    assert np.isin(tokens, nucleus).mean() > 0.95  # rounding decides on the last one
    assert np.abs(np.searchsorted(nucleus, tokens) - expected).max() <= 2


def test_masked_tokens_are_never_drawn():
    logits = normal(5000, batch=64)
    logits[np.random.default_rng(2).random(logits.shape) < 0.99] = -np.inf
    settings = np.float32([[1, 0.999 if n % 2 else 1, 0, 5000 if n % 3 else 50] for n in range(64)])
    for _ in range(5):
        tokens = draw(logits, settings, uniform(64))
        assert np.isfinite(logits[np.arange(64), tokens]).all()


def test_the_token_is_that_of_the_array_draw_for_the_same_number():
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(temperature=1e-9),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=0.3, top_p=0.5, top_k=7),
        SamplingParams(temperature=2.0, top_k=300),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.3, top_k=20, min_p=0.02, top_p=0.8),
    ] * 4
    logits, uniforms = mx.array(normal(3000)), mx.array(uniform())
    draws = KernelDraw(3000), ArrayDraw(3000, mx.softmax)
    for one in draws:
        one.configure(settings)
    ours, theirs = (one(one.cast(logits), uniforms).tolist() for one in draws)
    assert sum(token != own for token, own in zip(ours, theirs, strict=True)) <= 1
    halves = logits.astype(mx.bfloat16)
    assert draws[0](halves, uniforms).tolist() == draws[0](halves.astype(mx.float32), uniforms).tolist()


@LEVELS
@pytest.mark.parametrize("vocab", [1, 7, 1024, 5000])
def test_the_likeliest_tokens_and_the_sum_are_those_of_the_logits(vocab, level):
    logits = np.round(normal(vocab), 1)  # some are equal
    array = mx.array(logits)
    assert native().argmax(array, level).tolist() == logits.argmax(axis=1).tolist()
    for count in {0, 1, min(vocab, 20), min(vocab, 64)}:
        expected = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        assert np.array_equal(np.array(native().top(array, count, level)), expected)
    np.testing.assert_allclose(native().log_sum(array, level), mx.logsumexp(array, axis=-1, keepdims=True), rtol=1e-6)


@LEVELS
def test_the_likeliest_of_what_is_not_finite(level):
    logits = mx.array([[float("nan"), 1.0, float("inf"), -float("inf")], [-float("inf")] * 4])
    assert native().top(logits, 4, level).tolist() == [[2, 1, 0, 3], [0, 1, 2, 3]]
    assert native().log_sum(logits, level).tolist() == [[float("inf")], [-float("inf")]]


@LEVELS
@pytest.mark.parametrize("vocab", [1, 9, 1003])
def test_penalties_and_masks_are_those_without_kernels(vocab, level):
    chance = np.random.default_rng(vocab)
    logits = mx.array(normal(vocab, batch=6)).astype(mx.float16).astype(mx.float32)
    generated = mx.array(chance.integers(0, 3, logits.shape).astype(np.float32))
    prompted = mx.array(chance.random(logits.shape) < 0.5)
    penalties = mx.array(chance.random((6, 3)).astype(np.float32) + 0.5)
    allowed = mx.array(chance.integers(0, 256, (6, vocab // 8 + 2)).astype(np.uint8))
    masked = sampling_kernels.mask(logits.astype(mx.float16), allowed).astype(mx.float32)
    assert mx.array_equal(native().mask(logits, allowed, level), masked)
    plain = sampling_kernels.penalize(logits.astype(mx.float16), generated, prompted, penalties)
    ours = native().penalize(logits, generated, prompted, penalties, level)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_arrays_of_any_strides():
    wide = normal(2000)
    logits, settings = mx.array(wide)[:, ::2], mx.array(rows(1000).T.copy()).T
    dense = mx.array(wide[:, ::2].copy())
    uniforms = mx.array(uniform())
    assert mx.array_equal(native().draw(logits, settings, uniforms), native().draw(dense, settings, uniforms))
    allowed = mx.array(np.random.default_rng(0).integers(0, 256, (BATCH, 250)).astype(np.uint8))[:, ::2]
    assert mx.array_equal(native().mask(logits, allowed), sampling_kernels.mask(dense, allowed + 0))


def test_no_rows_have_no_tokens():
    none = mx.zeros((0, 8))
    assert native().argmax(none).shape == (0,)
    assert native().draw(none, mx.zeros((0, 4)), mx.zeros((0, 1))).shape == (0,)
    assert native().top(none, 3).shape == (0, 3)


def test_shapes_that_do_not_fit_are_refused():
    logits = mx.zeros((2, 16))
    for call in (
        lambda: native().argmax(mx.zeros((2, 0))),
        lambda: native().argmax(mx.zeros(16)),
        lambda: native().argmax(logits.astype(mx.float16)),
        lambda: native().draw(logits, mx.zeros((2, 3)), mx.zeros((2, 1))),
        lambda: native().draw(logits, mx.zeros((2, 4)), mx.zeros((1, 1))),
        lambda: native().top(logits, 17),
        lambda: native().top(mx.zeros((1, 100)), 65),
        lambda: native().mask(logits, mx.zeros((2, 1), mx.uint8)),
        lambda: native().mask(logits, mx.zeros((2, 2))),
        lambda: native().penalize(logits, logits, logits, mx.zeros((2, 3))),
        lambda: native().penalize(logits, mx.zeros((2, 15)), mx.zeros((2, 16), mx.bool_), mx.zeros((2, 3))),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            call()
