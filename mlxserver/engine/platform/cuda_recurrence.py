"""CUDA kernel for layers whose state is a matrix per head: Mamba-2 (Dao and Gu 2024) and the gated delta rule (Yang et
al. 2025).

Without it a chunk of a prompt is tens of operations per layer, or ten per token, and a decode step as many. Here it is
one. Each value dimension of a head has a row of the state, as long as a key, and no row needs another one: a block of
threads has some rows of one head, in registers, a few lanes for each, and goes from token to token. What its rows have
in common, keys, queries and gates, is read a few tokens ahead, and put into shared memory. All sums are float32.

Rule: inputs are read with their strides, whatever these are: parts of a projection are not copied.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Literal

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform.cuda_kernels import Constants, Kernel

Rule = Literal["mamba", "delta", "bounded delta"]

_THREADS = 128  # of a block
_SHARE = 2  # rows per thread, which use the same part of a key
_WIDTH = 16  # most values of a row per thread
_TOKENS = 8  # most that are read ahead
_SHARED_BYTES = 40 << 10  # of a block, for their keys, queries and gates
_MOST = 3.4028234e38  # of float32, in place of infinity

# Block (x, y, z): the x-th rows of head y of sequence z.
_SCAN = """
struct alignas(16) Four { float v[4]; };
constexpr int PIECES = DK / LANES / 4, ROWS = THREADS / LANES * SHARE;
constexpr int KEYS = (TOKENS * DK + THREADS - 1) / THREADS, VALUES = (TOKENS * ROWS + THREADS - 1) / THREADS;
constexpr int GATES = (TOKENS * DG + THREADS - 1) / THREADS;
const int thread = threadIdx.x, part = thread % LANES, group = thread / LANES;
const int head = blockIdx.y, heads = gridDim.y, batch = blockIdx.z, tokens = k_shape[1];
const int key_head = head / (heads / k_shape[2]), first = blockIdx.x * ROWS, row = first + group * SHARE;
auto softplus = [](float x) -> float { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); };
auto sigmoid = [](float x) -> float { return 1.0f / (1.0f + expf(-x)); };

Four state[SHARE][PIECES];
#pragma unroll
for (int r = 0; r < SHARE; r++) {
  #pragma unroll
  for (int p = 0; p < PIECES; p++) state[r][p] = Four{0, 0, 0, 0};
}
READ_STATE

const K* next_k = k + batch * k_strides[0] + key_head * k_strides[2];
const Q* next_q = q + batch * q_strides[0] + key_head * q_strides[2];
const V* next_v = v + batch * v_strides[0] + head * v_strides[2] + first * v_strides[3];
const A* next_a = a + batch * a_strides[0] + head * a_strides[2];
const float rate = expf(static_cast<float>(A_log[head * A_log_strides[0]]));
K read_k[KEYS];
Q read_q[KEYS];
V read_v[VALUES];
A read_a[GATES];
PREPARE
auto read = [&](int from) {
  const int count = min(TOKENS, tokens - from);
  #pragma unroll
  for (int n = 0; n < KEYS; n++) {
    const int t = (n * THREADS + thread) / DK, d = (n * THREADS + thread) % DK;
    if (t >= count) continue;
    read_k[n] = next_k[t * static_cast<int>(k_strides[1]) + d * static_cast<int>(k_strides[3])];
    read_q[n] = next_q[t * static_cast<int>(q_strides[1]) + d * static_cast<int>(q_strides[3])];
  }
  #pragma unroll
  for (int n = 0; n < VALUES; n++) {
    const int t = (n * THREADS + thread) / ROWS, d = (n * THREADS + thread) % ROWS;
    if (t >= count || first + d >= DV) continue;
    read_v[n] = next_v[t * static_cast<int>(v_strides[1]) + d * static_cast<int>(v_strides[3])];
  }
  #pragma unroll
  for (int n = 0; n < GATES; n++) {
    const int t = (n * THREADS + thread) / DG, d = (n * THREADS + thread) % DG;
    if (t >= count) continue;
    read_a[n] = next_a[t * static_cast<int>(a_strides[1]) + d * static_cast<int>(a_strides[3])];
  }
  if (thread < count) { READ }
  next_k += TOKENS * k_strides[1];
  next_q += TOKENS * q_strides[1];
  next_v += TOKENS * v_strides[1];
  next_a += TOKENS * a_strides[1];
};

__shared__ Four keys[2][TOKENS][DK / 4], queries[2][TOKENS][DK / 4], decays[2][TOKENS][(DG + 3) / 4];
__shared__ float values[2][TOKENS][ROWS], factors[2][TOKENS];
__shared__ bool kept[2][TOKENS];
read(0);
for (int from = 0, now = 0; from < tokens; from += TOKENS, now ^= 1) {
  const int count = min(TOKENS, tokens - from);
  #pragma unroll
  for (int n = 0; n < KEYS; n++) {
    const int t = (n * THREADS + thread) / DK, d = (n * THREADS + thread) % DK;
    if (t >= count) continue;
    keys[now][t][d / 4].v[d % 4] = static_cast<float>(read_k[n]);
    queries[now][t][d / 4].v[d % 4] = static_cast<float>(read_q[n]);
  }
  #pragma unroll
  for (int n = 0; n < VALUES; n++) {
    const int t = (n * THREADS + thread) / ROWS, d = (n * THREADS + thread) % ROWS;
    if (t < count) values[now][t][d] = first + d < DV ? static_cast<float>(read_v[n]) : 0;
  }
  #pragma unroll
  for (int n = 0; n < GATES; n++) {
    const int t = (n * THREADS + thread) / DG, d = (n * THREADS + thread) % DG;
    if (t >= count) continue;
    const float x = static_cast<float>(read_a[n]) +
                    static_cast<float>(dt_bias[head * dt_bias_strides[0] + d * dt_bias_strides[1]]);
    float& decay = decays[now][t][d / 4].v[d % 4];
    DECAY
  }
  if (thread < count) { WRITE }
  __syncthreads();  // behind it, what is written next has been used
  if (from + TOKENS < tokens) read(from + TOKENS);
  #pragma unroll 2
  for (int t = 0; t < count; t++) {
    O* const y = out + (((size_t)batch * tokens + from + t) * heads + head) * DV + row;
    SKIP
    Four key[PIECES], query[PIECES];
    #pragma unroll
    for (int p = 0; p < PIECES; p++) {
      key[p] = keys[now][t][p * LANES + part];
      query[p] = queries[now][t][p * LANES + part];
      const Four decay = decays[now][t][DG > 1 ? p * LANES + part : 0];
      #pragma unroll
      for (int r = 0; r < SHARE; r++) {
        #pragma unroll
        for (int j = 0; j < 4; j++) state[r][p].v[j] *= decay.v[DG > 1 ? j : 0];
      }
    }
    auto product = [&](const Four* one, const Four* other) -> float {  // of a row, whose lanes all have it
      Four sums{0, 0, 0, 0};
      #pragma unroll
      for (int p = 0; p < PIECES; p++) {
        #pragma unroll
        for (int j = 0; j < 4; j++) sums.v[j] += one[p].v[j] * other[p].v[j];
      }
      float sum = (sums.v[0] + sums.v[1]) + (sums.v[2] + sums.v[3]);
      #pragma unroll
      for (int lane = 1; lane < LANES; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
      return sum;
    };
    #pragma unroll
    for (int r = 0; r < SHARE; r++) {
      const float value = values[now][t][group * SHARE + r];
      const float delta = factors[now][t] * (DELTA);
      #pragma unroll
      for (int p = 0; p < PIECES; p++) {
        #pragma unroll
        for (int j = 0; j < 4; j++) state[r][p].v[j] += key[p].v[j] * delta;
      }
      const float sum = RESULT;
      if (part == r % LANES && row + r < DV) y[r] = static_cast<O>(sum);
    }
  }
}
#pragma unroll
for (int r = 0; r < SHARE; r++) {
  if (row + r >= DV) break;
  Four* const to = reinterpret_cast<Four*>(state_out) + (((size_t)batch * heads + head) * DV + row + r) * (DK / 4);
  #pragma unroll
  for (int p = 0; p < PIECES; p++) to[p * LANES + part] = state[r][p];
}
"""
_STATE = """
#pragma unroll
for (int r = 0; r < SHARE; r++) {
  if (row + r >= DV) break;
  const float* const own = state_in + batch * state_in_strides[0] + head * state_in_strides[1] +
                           (row + r) * state_in_strides[2];
  const bool is_plain = state_in_strides[3] == 1 && reinterpret_cast<size_t>(own) % 16 == 0;
  #pragma unroll
  for (int p = 0; p < PIECES; p++) {
    const int d = (p * LANES + part) * 4;
    if (is_plain) state[r][p] = *reinterpret_cast<const Four*>(own + d);
    else for (int j = 0; j < 4; j++) state[r][p].v[j] = own[(d + j) * state_in_strides[3]];
  }
}"""
_MASK = {
    "PREPARE": "bool is_kept;\n",
    "READ": "is_kept = mask[batch * mask_strides[0] + (from + thread) * mask_strides[1]]; ",
    "WRITE": "kept[now][thread] = is_kept; ",
    "SKIP": """if (!kept[now][t]) {
      for (int r = 0; r < SHARE; r++) if (part == r % LANES && row + r < DV) y[r] = static_cast<O>(0.0f);
      continue;
    }""",
}
_MAMBA = {
    "PREPARE": "",
    "READ": "",
    "WRITE": "",
    "DECAY": """const float step = fminf(fmaxf(softplus(x), LEAST), MOST);
    decay = expf(-rate * step);
    factors[now][t] = step;""",
    "DELTA": "value",
    "RESULT": "product(state[r], query) + value * static_cast<float>(D[head * D_strides[0]])",
}
_DELTA = {
    "PREPARE": "const B* const own_b = b + batch * b_strides[0] + head * b_strides[2];\nB read_b;\n",
    "READ": "read_b = own_b[(from + thread) * b_strides[1]]; ",
    "WRITE": "factors[now][thread] = sigmoid(static_cast<float>(read_b)) * LARGEST; ",
    "DECAY": "decay = expf(-rate * softplus(x));",
    "DELTA": "value - product(state[r], key)",
    "RESULT": "product(state[r], query)",
}
_RULES: Mapping[Rule, Mapping[str, str]] = {
    "mamba": _MAMBA,
    "delta": _DELTA,
    "bounded delta": {**_DELTA, "DECAY": "decay = expf(BOUND * sigmoid(rate * x));"},
}


def lanes(key_dim: int) -> int | None:
    """Lanes per row of the state; None: keys of this length are not supported."""
    counts = (count for count in (1, 2, 4, 8, 16, 32) if key_dim % (4 * count) == 0 and key_dim <= _WIDTH * count)
    return next(counts, None)


def mamba(
    x: mx.array,
    keys: mx.array,
    queries: mx.array,
    steps: mx.array,
    parameters: tuple[mx.array, mx.array, mx.array],
    limits: tuple[float, float],
    state: mx.array | None,
    mask: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """What a layer of Mamba-2 makes of x, [B, T, heads, dim], and its state after it, [B, heads, dim, key dim].

    keys, queries: B and C, [B, T, groups, key dim]. steps: dt, [B, T, heads]. parameters: A_log, dt_bias and D, of
    [heads]. limits: of the steps after softplus. state: None is one of zeros. mask: [B, T], the tokens that change it.
    """
    a_log, bias, weight = parameters
    inputs = {"k": keys, "q": queries, "v": x, "a": steps, "A_log": a_log, "dt_bias": bias, "D": weight}
    constants: Constants = {"LEAST": float(limits[0]), "MOST": min(float(limits[1]), _MOST)}
    return _launch("mamba", inputs, state, mask, mx.result_type(x, weight), constants)


def gated_delta(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    gates: tuple[mx.array, mx.array],
    parameters: tuple[mx.array, mx.array],
    state: mx.array | None,
    mask: mx.array | None,
    *,
    lower_bound: float | None,
    most: int,
) -> tuple[mx.array, mx.array]:
    """What queries find in a state that keys and values change by the gated delta rule, [B, T, heads, dim], and the
    state after it, [B, heads, dim, key dim].

    queries, keys: [B, T, key heads, key dim]. values: [B, T, heads, dim]. gates: a, [B, T, heads] or [B, T, heads, key
    dim], and b, [B, T, heads]. parameters: A_log, of each head, and dt_bias, of each value of a. state, mask: as in
    mamba(). lower_bound: of the decay's logarithm. most: that beta can be.
    """
    inputs = {"k": keys, "q": queries, "v": values, "a": gates[0], "b": gates[1]}
    inputs |= {"A_log": parameters[0], "dt_bias": parameters[1]}
    constants: Constants = {"B": gates[1].dtype, "LARGEST": most}
    if lower_bound is None:
        return _launch("delta", inputs, state, mask, queries.dtype, constants)
    return _launch("bounded delta", inputs, state, mask, queries.dtype, {**constants, "BOUND": float(lower_bound)})


def _launch(
    rule: Rule,
    inputs: dict[str, mx.array],
    state: mx.array | None,
    mask: mx.array | None,
    dtype: mx.Dtype,
    constants: Constants,
) -> tuple[mx.array, mx.array]:
    """The output, of the type, and the state of a recurrence."""
    batch, tokens, heads, dim = inputs["v"].shape
    key_dim = inputs["k"].shape[3]
    gate_dim = key_dim if inputs["a"].ndim == 4 else 1
    count = lanes(key_dim)
    assert count is not None
    ahead = next(n for n in (_TOKENS, 4, 2) if 8 * n * (2 * key_dim + gate_dim) <= _SHARED_BYTES)
    types = {name.upper(): inputs[name].dtype for name in "kqva"}
    sizes = {"DK": key_dim, "DV": dim, "DG": gate_dim, "LANES": count, "TOKENS": ahead}
    if state is not None:
        inputs["state_in"] = state
    if mask is not None:
        inputs["mask"] = mask
    kernel = _kernel(rule, tuple(inputs), tuple({**types, "O": dtype, **sizes, **constants}.items()))
    y, state = kernel(
        list(inputs.values()),
        [((batch, tokens, heads, dim), dtype), ((batch, heads, dim, key_dim), mx.float32)],
        blocks=(-(-dim * count // (_THREADS * _SHARE)), heads, batch),
        threads=_THREADS,
    )
    return y, state


@functools.cache
def _kernel(rule: Rule, inputs: tuple[str, ...], constants: tuple[tuple[str, int | float | mx.Dtype], ...]) -> Kernel:
    parts = {"SKIP": "", **_RULES[rule], "READ_STATE": _STATE if "state_in" in inputs else ""}
    if "mask" in inputs:
        parts |= {name: parts[name] + text for name, text in _MASK.items()}
    source = re.sub(rf"\b({'|'.join(parts)})\b", lambda found: parts[found[0]], _SCAN)
    sizes = {**dict(constants), "THREADS": _THREADS, "SHARE": _SHARE}
    return Kernel("recurrence", inputs, ["out", "state_out"], source, sizes, copies=False)
