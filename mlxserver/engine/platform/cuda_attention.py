"""CUDA kernel for the attention of a decode step: few tokens per row, over slots of several capacity classes at once.

MLX's attention with a mask is cuDNN's there, which has one block of threads per row and head: beside a sequence of
60,000 tokens a layer took 494 us, of which reading the keys and values is 26. Here the tokens of a row are split over
many blocks, each with its own running softmax (Dao et al. 2023, Flash-Decoding), and merged by a second kernel. A row's
time follows its own length, not the capacity of its slot, and no mask is made. Scores and sums are float32. Several
tokens of a row have a block each for the same keys and values, next to each other, so that one of them reads these and
the others find them in the GPU's cache: a step that verifies drafted tokens needs no other kernel, and no plan.

Rule: what supports() refuses is left to MLX.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import device
from mlxserver.engine.platform.cuda_kernels import Constants, Kernel

_WARPS = 8  # of a block that reads keys and values
_CHUNK = 256  # least tokens per block
_SPLITS = 64  # most blocks per row and key head
_DIMS = (32, 64, 128, 256)
_QUERIES = 8  # most query heads per block: each has its sums in registers
_SHARED_BYTES = 48 << 10  # of a block, where warps put their sums together
_TOKENS = 16  # most tokens per row

# Block (x, y, z): part of what each token of row z attends to, by part and token, for the y-th group of G query heads
# that share a key head.
_READ = """
struct alignas(16) Eight { T v[8]; };
constexpr int LANES = D / 8, KEYS = 32 / LANES, STEP = 4;  // lanes per key; keys per warp; of them at once
const int tokens = q_shape[2], own = blockIdx.x % tokens, split = blockIdx.x / tokens, splits = gridDim.x / tokens;
const int row = blockIdx.z, group = blockIdx.y;
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES;
const int length = offsets[row] + own + 1;
const int chunk = max(CHUNK, (length + splits - 1) / splits);
const int start = split * chunk, stop = min(length, start + chunk);
if (start >= stop) return;
const T *k = nullptr, *v = nullptr;
int slot = row, heads = 0, capacity = 0;
CHOOSE
const size_t base = (size_t)(slot * heads + group / SHARES) * capacity * D;
const size_t first = ((size_t)row * gridDim.y + group) * G;  // query head of the batch
auto query_of = [&](int g) -> size_t { return (first + g) * tokens + own; };
float query[G][8], sum[G][8], most[G], total[G];
#pragma unroll
for (int g = 0; g < G; g++) {
  const Eight given = reinterpret_cast<const Eight*>(q + query_of(g) * D)[part];
  most[g] = -1e30f;
  total[g] = 0;
  #pragma unroll
  for (int i = 0; i < 8; i++) {
    query[g][i] = static_cast<float>(given.v[i]) * SCALE * 1.4426950408889634f;
    sum[g][i] = 0;
  }
}
for (int at = start + warp * KEYS * STEP; at < stop; at += WARPS * KEYS * STEP) {
  Eight key[STEP], value[STEP];
  #pragma unroll
  for (int n = 0; n < STEP; n++) {
    const size_t token = base + (size_t)min(at + n * KEYS + lane / LANES, stop - 1) * D;
    key[n] = reinterpret_cast<const Eight*>(k + token)[part];
    value[n] = reinterpret_cast<const Eight*>(v + token)[part];
  }
  #pragma unroll
  for (int g = 0; g < G; g++) {
    float score[STEP], peak = most[g];
    #pragma unroll
    for (int n = 0; n < STEP; n++) {
      score[n] = 0;
      #pragma unroll
      for (int i = 0; i < 8; i++) score[n] += query[g][i] * static_cast<float>(key[n].v[i]);
      #pragma unroll
      for (int other = LANES / 2; other; other /= 2) score[n] += __shfl_xor_sync(0xffffffffu, score[n], other);
      if (at + n * KEYS + lane / LANES >= stop) score[n] = -INFINITY;
      peak = fmaxf(peak, score[n]);
    }
    const float keep = exp2f(most[g] - peak);
    most[g] = peak;
    total[g] *= keep;
    #pragma unroll
    for (int i = 0; i < 8; i++) sum[g][i] *= keep;
    #pragma unroll
    for (int n = 0; n < STEP; n++) {
      const float weight = exp2f(score[n] - peak);
      total[g] += weight;
      #pragma unroll
      for (int i = 0; i < 8; i++) sum[g][i] += weight * static_cast<float>(value[n].v[i]);
    }
  }
}
__shared__ float mosts[WARPS][G], totals[WARPS][G], sums[WARPS][G][D];
#pragma unroll
for (int g = 0; g < G; g++) {
  #pragma unroll
  for (int other = LANES; other < 32; other *= 2) {
    const float theirs = __shfl_xor_sync(0xffffffffu, most[g], other), peak = fmaxf(most[g], theirs);
    const float mine = exp2f(most[g] - peak), its = exp2f(theirs - peak);
    most[g] = peak;
    total[g] = total[g] * mine + __shfl_xor_sync(0xffffffffu, total[g], other) * its;
    #pragma unroll
    for (int i = 0; i < 8; i++)
      sum[g][i] = sum[g][i] * mine + __shfl_xor_sync(0xffffffffu, sum[g][i], other) * its;
  }
  if (lane < LANES) {
    if (part == 0) { mosts[warp][g] = most[g]; totals[warp][g] = total[g]; }
    #pragma unroll
    for (int i = 0; i < 8; i++) sums[warp][g][part * 8 + i] = sum[g][i];
  }
}
__syncthreads();
for (int each = threadIdx.x; each < G * D; each += WARPS * 32) {
  const int g = each / D, d = each % D;
  float peak = -1e30f, all = 0, weights = 0;
  for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, mosts[w][g]);
  for (int w = 0; w < WARPS; w++) {
    const float share = exp2f(mosts[w][g] - peak);
    all += sums[w][g][d] * share;
    weights += totals[w][g] * share;
  }
  WRITE
}
"""
_CHOOSE = """
if (!k) {
  if (slot < k#_shape[0]) { k = k#; v = v#; heads = k#_shape[1]; capacity = k#_shape[2]; }
  else slot -= k#_shape[0];
}"""
_WRITE_WHOLE = "out[query_of(g) * D + d] = static_cast<T>(all / weights);"
_WRITE_PART = """
  const size_t piece = query_of(g) * splits + split;
  parts[piece * D + d] = all;
  if (d == 0) { stats[piece * 2] = peak; stats[piece * 2 + 1] = weights; }
"""
# Block x: query x of the batch, by row, head and token; thread d: that dimension.
_MERGE = """
const int splits = stats_shape[1], d = threadIdx.x, tokens = stats_shape[0] / (offsets_shape[0] * HEADS);
const int length = offsets[blockIdx.x / (HEADS * tokens)] + blockIdx.x % tokens + 1;
const int chunk = max(CHUNK, (length + splits - 1) / splits), used = (length + chunk - 1) / chunk;
const float* own = stats + (size_t)blockIdx.x * splits * 2;
const float* from = parts + (size_t)blockIdx.x * splits * D;
float peak = -1e30f, sum = 0, total = 0;
for (int n = 0; n < used; n++) peak = fmaxf(peak, own[2 * n]);
#pragma unroll 4
for (int n = 0; n < used; n++) {
  const float share = exp2f(own[2 * n] - peak);
  sum += from[n * D + d] * share;
  total += own[2 * n + 1] * share;
}
out[(size_t)blockIdx.x * D + d] = static_cast<T>(sum / total);
"""


def supports(queries: mx.array, keys: Sequence[mx.array], values: Sequence[mx.array]) -> bool:
    """Whether decode_attention() can have these, as far as their shapes and types say it."""
    dim = queries.shape[3]
    return (
        device.describe().kind == "cuda"
        and queries.shape[2] <= _TOKENS
        and queries.dtype in (mx.bfloat16, mx.float16)
        and dim in _DIMS
        and all(own.shape[3] == dim and own.dtype == queries.dtype for own in (*keys, *values))
    )


def decode_attention(
    queries: mx.array, keys: Sequence[mx.array], values: Sequence[mx.array], offsets: mx.array, scale: float
) -> mx.array:
    """Attention of each row's tokens to those of its slot, up to their own: [rows, heads, tokens, dim].

    queries: [rows, heads, tokens, dim]. keys, values: per class [slots, kv heads, capacity, dim]; the rows are the
    slots of all classes, in order. offsets: [rows] of int32, of the first token of each.
    """
    rows, heads, tokens, dim = queries.shape
    kv_heads = keys[0].shape[1]
    most = min(_QUERIES, _SHARED_BYTES // (_WARPS * (dim + 2) * 4))
    per_block = next(count for count in range(most, 0, -1) if heads // kv_heads % count == 0)
    shares = heads // kv_heads // per_block  # blocks that share a key head
    splits = max(1, min(_SPLITS, max(own.shape[2] for own in keys) // (2 * _CHUNK)))
    count = rows * heads * tokens
    whole = (queries.shape, queries.dtype)
    pieces = (((count, splits, dim), mx.float32), ((count, splits, 2), mx.float32))
    read = _read_kernel(len(keys), splits > 1, queries.dtype, dim, per_block, shares, scale)(
        [queries, offsets, *keys, *values],
        [whole] if splits == 1 else pieces,
        blocks=(splits * tokens, heads // per_block, rows),
        threads=_WARPS * 32,
    )
    if splits == 1:
        return read[0]
    return _merge_kernel(queries.dtype, dim, heads)([*read, offsets], [whole], blocks=(count, 1, 1), threads=dim)[0]


@functools.cache
def _read_kernel(
    classes: int, is_split: bool, dtype: mx.Dtype, dim: int, per_block: int, shares: int, scale: float
) -> Kernel:
    keys, values = ([f"{name}{n}" for n in range(classes)] for name in "kv")
    choose = "".join(_CHOOSE.replace("#", str(n)) for n in range(classes))
    return Kernel(
        f"decode_attention_{classes}_{'parts' if is_split else 'whole'}",
        ["q", "offsets", *keys, *values],
        ["parts", "stats"] if is_split else ["out"],
        _READ.replace("CHOOSE", choose).replace("WRITE", _WRITE_PART if is_split else _WRITE_WHOLE),
        {"T": dtype, "D": dim, "G": per_block, "SHARES": shares, "WARPS": _WARPS, "CHUNK": _CHUNK, "SCALE": scale},
    )


@functools.cache
def _merge_kernel(dtype: mx.Dtype, dim: int, heads: int) -> Kernel:
    constants: Constants = {"T": dtype, "D": dim, "HEADS": heads, "CHUNK": _CHUNK}
    return Kernel("decode_attention_merge", ["parts", "stats", "offsets"], ["out"], _MERGE, constants)
