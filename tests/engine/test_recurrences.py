"""Mamba-2 and the gated delta rule beside mlx-lm's own functions. Kernels need an NVIDIA GPU, or a CPU that has native
ones; elsewhere the functions are mlx-lm's.
"""

import sys
from dataclasses import replace
from itertools import pairwise

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.gated_delta import normalize_qk

from mlxserver.engine.loading.loader import prepare
from mlxserver.engine.platform import recurrences
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.policy import METAL
from mlxserver.engine.platform.recurrences import (
    gated_delta_update,
    mlx_lm_gated_delta_update,
    mlx_lm_ssm_update,
    ssm_update,
)
from tools.zoo import models

LEVELS = native().levels() if native() else []
needs_kernel = pytest.mark.skipif(not mx.cuda.is_available() and not LEVELS, reason="needs a kernel")
EXACT = 1e-5
PRODUCTS = 1e-2 if mx.cuda.is_available() else EXACT  # of float32, which MLX rounds there; mlx-lm's Mamba-2 has some

# Sequences, tokens, heads, groups of keys, dimensions of a head, of a key.
SHAPES = {
    "one token": (3, 1, 4, 4, 64, 128),
    "a few tokens": (2, 7, 4, 2, 64, 128),
    "a chunk": (1, 70, 8, 8, 128, 128),
    "many tokens": (1, 300, 2, 1, 64, 128),
    "grouped keys": (2, 19, 6, 2, 64, 64),
    "one group": (1, 33, 4, 1, 128, 256),
    "tiny heads": (2, 9, 4, 2, 16, 16),
    "keys of 96": (2, 8, 2, 2, 192, 96),
    "an odd head": (1, 11, 3, 1, 37, 32),
    "long keys": (1, 10, 2, 1, 64, 512),
}
BOUNDS = {"standard": {}, "negative": {"allow_neg_eigval": True}, "bounded": {"lower_bound": -5.0}}


def noise(*shape, dtype=mx.float32):
    return mx.random.normal(shape).astype(dtype)


def mask_of(tokens, sequences, side):
    """Which tokens are no padding, of sequences that are shorter and shorter."""
    if side is None:
        return None, None
    lengths = mx.array([max(tokens - 3 * n, min(tokens, 1)) for n in range(sequences)])
    positions = mx.arange(tokens)[None]
    is_kept = positions < lengths[:, None] if side == "right" else positions >= tokens - lengths[:, None]
    return is_kept, lengths if side == "right" else None


def mamba_inputs(shape, has_state=True, dtype=mx.float32):
    """What ssm_update() has by position, up to the state."""
    mx.random.seed(3)
    sequences, tokens, heads, groups, dim, key_dim = shape
    x, steps = noise(sequences, tokens, heads, dim, dtype=dtype), noise(sequences, tokens, heads, dtype=dtype)
    keys, queries = (noise(sequences, tokens, groups, key_dim, dtype=dtype) for _ in "BC")
    a_log, weight, bias = noise(heads), noise(heads, dtype=dtype), noise(heads, dtype=dtype)
    return [x, a_log, keys, queries, weight, steps, bias, noise(sequences, heads, dim, key_dim) if has_state else None]


def delta_inputs(shape, has_state=True, dtype=mx.float32, *, is_gate_per_key=False):
    """What gated_delta_update() has by position, up to the state."""
    mx.random.seed(4)
    sequences, tokens, heads, groups, dim, key_dim = shape
    queries, keys = (noise(sequences, tokens, groups, key_dim, dtype=dtype) for _ in "qk")
    queries, keys = normalize_qk(queries, keys, inv_scale=key_dim**-0.5, eps=1e-6)
    values, b = noise(sequences, tokens, heads, dim, dtype=dtype), noise(sequences, tokens, heads, dtype=dtype)
    gates = (heads, key_dim) if is_gate_per_key else (heads,)
    a, bias = noise(sequences, tokens, *gates, dtype=dtype), noise(*gates, dtype=dtype)
    a_log = noise(heads, 1) if is_gate_per_key else noise(heads)
    return [queries, keys, values, a, b, a_log, bias, noise(sequences, heads, dim, key_dim) if has_state else None]


def difference(found, wanted, is_kept=None):
    """The larger difference of output and state, as a part of the largest value. Padding has any output."""
    worst = 0.0
    for n, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = one.astype(mx.float32), other.astype(mx.float32)
        if n == 0 and is_kept is not None:
            one, other = (mx.where(is_kept[..., None, None], array, 0) for array in (one, other))
        worst = max(worst, (mx.abs(one - other).max() / mx.abs(other).max()).item())
    return worst


def tokens_of(inputs, start, stop, per_token):
    """The inputs of some of the tokens."""
    return [array[:, start:stop] if n in per_token else array for n, array in enumerate(inputs)]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("has_state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mamba_computes_what_mlx_lm_does(shape, has_state, side):
    inputs = mamba_inputs(shape, has_state)
    is_kept, lengths = mask_of(shape[1], shape[0], side)
    limits = (0.001, 100.0), is_kept, lengths
    if side == "right" and not has_state:  # mlx-lm would need one for a sequence that has ended
        inputs[-1] = mx.zeros((shape[0], shape[2], shape[4], shape[5]))
    assert difference(ssm_update(*inputs, *limits), mlx_lm_ssm_update(*inputs, *limits), is_kept) < PRODUCTS


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("is_gate_per_key", [True, False], ids=["gates per key", "gates per head"])
@pytest.mark.parametrize(("has_state", "side"), [(True, None), (False, None), (True, "left"), (False, "right")])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_gated_delta_rule_computes_what_mlx_lm_does(shape, has_state, side, is_gate_per_key, bounds):
    inputs = delta_inputs(shape, has_state, is_gate_per_key=is_gate_per_key)
    is_kept, _ = mask_of(shape[1], shape[0], side)
    wanted = mlx_lm_gated_delta_update(*inputs, is_kept, **bounds)
    assert difference(gated_delta_update(*inputs, is_kept, **bounds), wanted, is_kept) < EXACT


@pytest.mark.parametrize(
    ("update", "make", "per_token"),
    [(ssm_update, mamba_inputs, (0, 2, 3, 5)), (gated_delta_update, delta_inputs, (0, 1, 2, 3, 4))],
    ids=["mamba", "delta"],
)
def test_a_chunk_is_what_its_parts_and_its_tokens_are(update, make, per_token):
    inputs = make((2, 29, 4, 2, 64, 128))
    whole = update(*inputs)
    for cuts in ([0, 8, 21, 29], range(30)):
        outputs, state = [], inputs[-1]
        for start, stop in pairwise(cuts):
            y, state = update(*tokens_of(inputs[:-1], start, stop, per_token), state)
            outputs.append(y)
        assert difference((mx.concatenate(outputs, axis=1), state), whole) < EXACT


@pytest.mark.parametrize("limits", [(0.0, float("inf")), (0.5, 0.7)])
def test_steps_of_mamba_are_held_to_their_limits(limits):
    inputs = mamba_inputs((1, 12, 4, 2, 64, 64))
    assert difference(ssm_update(*inputs, limits), mlx_lm_ssm_update(*inputs, limits)) < PRODUCTS


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_outputs_have_the_type_of_mlx_lm_and_states_are_float32(dtype):
    shape = (2, 21, 4, 2, 64, 128)
    mamba, delta = mamba_inputs(shape, dtype=dtype), delta_inputs(shape, dtype=dtype)
    weight = mamba[4].astype(mx.float32)
    for inputs in (mamba, [*mamba[:4], weight, *mamba[5:]]):
        assert difference(ssm_update(*inputs), mlx_lm_ssm_update(*inputs)) < 0.03
    found = gated_delta_update(*delta)
    assert found[1].dtype == mx.float32
    assert difference(found, mlx_lm_gated_delta_update(*delta)) < 0.03


@pytest.mark.parametrize(
    ("update", "make"), [(ssm_update, mamba_inputs), (gated_delta_update, delta_inputs)], ids=["mamba", "delta"]
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_state_that_others_have_stays_what_it_is(update, make, tokens):
    """A kernel may write to the memory of a state that has no other use: a checkpoint of the prefix cache is one."""
    *inputs, state = make((2, tokens, 4, 2, 64, 128))
    before = state + 0
    mx.eval(state, before)
    for _ in range(3):
        following = update(*inputs, state)[1]
        following = update(*inputs, following)[1]
        mx.eval(following)
        assert mx.array_equal(state, before)
    again = update(*inputs, update(*inputs, before)[1])[1]
    assert mx.array_equal(again, following)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set_computes_what_mlx_lm_does(shape, level):
    x, a_log, keys, queries, weight, steps, bias, state = mamba_inputs(shape)
    is_kept, lengths = mask_of(shape[1], shape[0], "right")
    found = native().mamba(x, keys, queries, steps, a_log, bias, weight, 0.001, 100.0, state, is_kept, level=level)
    wanted = mlx_lm_ssm_update(x, a_log, keys, queries, weight, steps, bias, state, mask=is_kept, lengths=lengths)
    assert difference(found, wanted, is_kept) < EXACT
    for is_gate_per_key in (False, True):
        inputs = delta_inputs(shape, is_gate_per_key=is_gate_per_key)
        found = native().gated_delta(*inputs[:7], 1, None, inputs[7], is_kept, level=level)
        assert difference(found, mlx_lm_gated_delta_update(*inputs, is_kept), is_kept) < EXACT


def test_parts_of_a_projection_are_read_where_they_are():
    sequences, tokens, heads, dim, key_dim = 2, 13, 4, 64, 32
    widths = [heads * dim, 2 * key_dim, 2 * key_dim, heads]
    projected = noise(sequences, tokens, sum(widths) + 5)
    parts = mx.split(projected, [sum(widths[:n]) for n in range(1, 5)], axis=-1)
    x, keys, queries = (
        part.reshape(sequences, tokens, -1, width) for part, width in zip(parts, (dim, key_dim, key_dim), strict=False)
    )
    state = noise(key_dim, sequences, heads, dim).transpose(1, 2, 3, 0)
    inputs = [x, noise(heads), keys, queries, noise(heads), parts[3], noise(heads), state]
    assert difference(ssm_update(*inputs), mlx_lm_ssm_update(*inputs)) < PRODUCTS
    gates = noise(heads, tokens, sequences).T
    inputs = [queries, keys, x, parts[3], gates, noise(heads), noise(heads), state]
    assert difference(gated_delta_update(*inputs), mlx_lm_gated_delta_update(*inputs)) < 10 * EXACT


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_takes_all_of_these(shape):
    queries, keys, values, *others, state = delta_inputs(shape)
    assert recurrences.supports(keys, queries, values, state, mask_of(shape[1], shape[0], "left")[0], others)


@pytest.mark.parametrize(
    ("key_dim", "types"),
    [(50, {}), (1024, {}), (64, {"keys": mx.int32}), (64, {"state": mx.bfloat16}), (64, {"mask": mx.float32})],
)
def test_other_shapes_and_types_are_left_to_mlx_lm(key_dim, types):
    keys = mx.zeros((1, 5, 2, key_dim), dtype=types.get("keys", mx.float32))
    state = mx.zeros((1, 2, 64, key_dim), dtype=types.get("state", mx.float32))
    mask = mx.ones((1, 5), dtype=types.get("mask", mx.bool_))
    assert not recurrences.supports(keys, keys, mx.zeros((1, 5, 2, 64)), state, mask, [])


MODELS = ["granitemoehybrid", "falcon_h1", "nemotron_h", "mamba2", "plamo2"]
MODELS += ["qwen3_next", "qwen3_5", "kimi_linear", "olmo_hybrid", "kimi_k3", "bailing_moe_v3"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_what_it_says_with_mlx_lm_s_functions(name):
    model = models.build(name)
    with pytest.MonkeyPatch.context() as patch:
        for module in [module for name, module in sys.modules.items() if name.startswith("mlx_lm.models.")]:
            for function in (mlx_lm_ssm_update, mlx_lm_gated_delta_update):
                if hasattr(module, function.__name__):
                    patch.setattr(module, function.__name__, function)
        wanted, their_scores = greedy(model)
        recurrences.replace_functions()
        said, scores = greedy(model)
    assert said == wanted
    assert mx.allclose(scores, their_scores, rtol=0.01, atol=0.01 if mx.cuda.is_available() else 1e-4)


@pytest.mark.parametrize("has_kernel", [True, False])
def test_the_policy_decides_what_the_model_s_code_calls(monkeypatch, has_kernel):
    model = models.build("mamba2")
    code = sys.modules[type(model).__module__]
    monkeypatch.setattr(code, "ssm_update", mlx_lm_ssm_update)
    prepare(model, lambda *_: None, replace(METAL, scan_kernel=has_kernel))
    assert code.ssm_update is (ssm_update if has_kernel else mlx_lm_ssm_update)


def greedy(model, count=12):
    """The likeliest continuation of a prompt, token by token, and the scores of all."""
    cache = make_prompt_cache(model)
    scores = [model(mx.array([[5, 9, 17, 3, 200, 41, 7, 8, 60, 30, 11]]), cache=cache)[:, -1]]
    said = []
    for _ in range(count):
        said.append(mx.argmax(scores[-1], axis=-1))
        scores.append(model(said[-1][:, None], cache=cache)[:, -1])
    return mx.concatenate(said).tolist(), mx.concatenate(scores).astype(mx.float32)
