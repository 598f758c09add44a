"""CUDA kernels for what lies between the products and the attention of a decoder layer, two instead of eight.

A decode step is bound by the host there, which takes 10 to 19 us for each kernel that it launches. Here a sum and the
norm of it are one kernel, and so is all that makes queries, keys and values of one product: norms of heads, rotary
embedding, and the order in memory that writing and attention need.

Rule: values are those of MLX's own kernels, bit for bit: they are rounded where those are rounded (x + r, norm, norm
      times weight, rotary embedding), and squares are added in the order of MLX's rms_norm.cu. What a kernel does not
      know is left to MLX's operations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import device
from mlxserver.engine.platform.cuda_kernels import Constants, Kernel
from mlxserver.engine.platform.layer_forms import Rotation

_LANE = 8  # values that a thread reads at once, 16 bytes
_NARROW, _WIDE = 128 * 8, 1024 * 8  # most vectors of a row: in blocks of 128 threads, and at all
_MOST_DIM = 256  # of a head: the norm of one is that of a warp
_MOST_THREADS = 512

# Block x: row x. A thread has every THREADS-th vector of it.
_ADD_NORM = """
struct alignas(16) Eight { T v[8]; };
constexpr int WARPS = THREADS / 32;
const int thread = threadIdx.x, lane = thread % 32;
const size_t row = (size_t)blockIdx.x * WIDTH;
const bool is_aligned = WIDTH % 8 == 0 && ((size_t)x | (size_t)r | (size_t)weight) % 16 == 0;
auto read = [&](const T* from, int at) -> Eight {
  if (is_aligned && at < WIDTH) return *reinterpret_cast<const Eight*>(from + at);
  Eight all;
  for (int i = 0; i < 8; i++) all.v[i] = at + i < WIDTH ? from[at + i] : static_cast<T>(0.0f);
  return all;
};
auto write = [&](T* to, int at, const Eight& all) {
  if (WIDTH % 8 == 0 && at < WIDTH) *reinterpret_cast<Eight*>(to + at) = all;
  else for (int i = 0; i < 8; i++) if (at + i < WIDTH) to[at + i] = all.v[i];
};
Eight own[VECTORS];
float squares = 0;
#pragma unroll
for (int n = 0; n < VECTORS; n++) {
  const int at = (n * THREADS + thread) * 8;
  const Eight a = read(x + row, at), b = read(r + row, at);
  #pragma unroll
  for (int i = 0; i < 8; i++) {
    own[n].v[i] = static_cast<T>(static_cast<float>(a.v[i]) + static_cast<float>(b.v[i]));
    const float value = static_cast<float>(own[n].v[i]);
    squares += value * value;
  }
  write(sum + row, at, own[n]);
}
__shared__ float parts[WARPS];
#pragma unroll
for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
if (lane == 0) parts[thread / 32] = squares;
__syncthreads();
squares = lane < WARPS ? parts[lane] : 0;
#pragma unroll
for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
const float scale = rsqrtf(squares / WIDTH + EPS);
#pragma unroll
for (int n = 0; n < VECTORS; n++) {
  const int at = (n * THREADS + thread) * 8;
  const Eight by = read(weight, at);
  #pragma unroll
  for (int i = 0; i < 8; i++) {
    const T value = static_cast<T>(static_cast<float>(own[n].v[i]) * scale);
    own[n].v[i] = static_cast<T>(static_cast<float>(by.v[i]) * static_cast<float>(value));
  }
  write(normed + row, at, own[n]);
}
"""
# Block (x, y): token x of row y. LANES threads have a head, each of them eight values in either half of it.
_SPLIT = """
struct alignas(16) Eight { T v[8]; };
constexpr int HALF = D / 2, HEADS = H + 2 * K;
const int token = blockIdx.x, tokens = gridDim.x, row = blockIdx.y, part = threadIdx.x % LANES * 8;
const bool is_used = part < HALF;
__shared__ float cosines[HALF], sines[HALF];
for (int d = threadIdx.x; d < HALF; d += THREADS) {
  const float position = SCALE * static_cast<float>(offsets[row] + token);
  const float angle = position * (FREQUENCY);
  cosines[d] = cosf(angle);
  sines[d] = sinf(angle);
}
__syncthreads();
for (int head = threadIdx.x / LANES; head < HEADS; head += THREADS / LANES) {
  const T* from = product + (((size_t)row * tokens + token) * HEADS + head) * D + part;
  Eight low, high;
  if (is_used) {
    low = *reinterpret_cast<const Eight*>(from);
    high = *reinterpret_cast<const Eight*>(from + HALF);
  }
  if (head < H + K) {
    NORM
    #pragma unroll
    for (int i = 0; is_used && i < 8; i++) {
      const float a = static_cast<float>(low.v[i]), b = static_cast<float>(high.v[i]);
      const float c = cosines[part + i], s = sines[part + i];
      low.v[i] = static_cast<T>(fmaf(a, c, -(b * s)));
      high.v[i] = static_cast<T>(fmaf(a, s, b * c));
    }
  }
  T* to = head < H ? q + ((size_t)row * H + head) * tokens * D
      : head < H + K ? k + ((size_t)row * K + head - H) * tokens * D
      : v + ((size_t)row * K + head - H - K) * tokens * D;
  to += (size_t)token * D + part;
  if (is_used) {
    *reinterpret_cast<Eight*>(to) = low;
    *reinterpret_cast<Eight*>(to + HALF) = high;
  }
}
"""
_FREQUENCY = "exp2f(-(static_cast<float>(d) / static_cast<float>(HALF)) * BASE)"
_NORM = """
    float squares = 0, more = 0;
    for (int i = 0; is_used && i < 8; i++) {
      const float a = static_cast<float>(low.v[i]), b = static_cast<float>(high.v[i]);
      squares += a * a;
      more += b * b;
    }
    squares += more;
    const unsigned mates = (LANES < 32 ? (1u << LANES % 32) - 1 : ~0u) << threadIdx.x % 32 / LANES * LANES;
    for (int other = LANES / 2; other; other /= 2) squares += __shfl_xor_sync(mates, squares, other);
    const float scale = rsqrtf(squares / D + EPS);
    const T* by = (head < H ? q_weight : k_weight) + part;
    for (int i = 0; is_used && i < 8; i++) {
      const T a = static_cast<T>(static_cast<float>(low.v[i]) * scale);
      const T b = static_cast<T>(static_cast<float>(high.v[i]) * scale);
      low.v[i] = static_cast<T>(static_cast<float>(by[i]) * static_cast<float>(a));
      high.v[i] = static_cast<T>(static_cast<float>(by[HALF + i]) * static_cast<float>(b));
    }
"""


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    """RMS norms of the heads of queries and of keys: weights, [dim] each."""

    queries: mx.array
    keys: mx.array
    eps: float


def add_norm(x: mx.array, r: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """x + r as x [..., width] is, and the RMS norm of it as [tokens, width]. r: of either shape; weight: [width]."""
    width = x.shape[-1]
    if not _has_kernel(x, r, weight) or -(-width // _LANE) > _WIDE:
        total = x + r.reshape(x.shape)
        return total, mx.fast.rms_norm(total, weight, eps).reshape(-1, width)
    threads, kernel = _add_norm_kernel(x.dtype, width, eps)
    tokens = x.size // width
    outputs = [(x.shape, x.dtype), ((tokens, width), x.dtype)]
    total, normed = kernel([x, r, weight], outputs, blocks=(tokens, 1, 1), threads=threads)
    return total, normed


def split_heads(
    product: mx.array, heads: int, kv_heads: int, rotation: Rotation, offsets: mx.array, norms: HeadNorms | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries [rows, heads, tokens, dim], keys and values [rows, KV heads, tokens, dim] of their common product.

    product: [rows * tokens, (heads + 2 * kv_heads) * dim], queries first. Queries and keys are normalised, if there are
    norms, and then rotated to their positions. offsets: [rows] of int32, of the first token of each.
    """
    rows, width = offsets.shape[0], product.shape[-1]
    tokens = product.shape[0] // rows
    dim = width // (heads + 2 * kv_heads)
    weights = [norms.queries, norms.keys] if norms else []
    if not _has_kernel(product, *weights) or dim % (2 * _LANE) or dim > _MOST_DIM or not product.size:
        return _split_by_mlx(product, heads, kv_heads, rotation, offsets, norms)
    lanes = 1 << (dim // (2 * _LANE) - 1).bit_length()
    threads = min(_MOST_THREADS, -(-(heads + 2 * kv_heads) * lanes // 32) * 32)
    kernel = _split_kernel(
        product.dtype,
        dim,
        (heads, kv_heads, lanes, threads),
        rotation.base,
        rotation.scale,
        norms.eps if norms else None,
    )
    freqs = [] if rotation.freqs is None else [rotation.freqs]
    outputs = [((rows, count, tokens, dim), product.dtype) for count in (heads, kv_heads, kv_heads)]
    q, k, v = kernel([product, offsets, *freqs, *weights], outputs, blocks=(tokens, rows, 1), threads=threads)
    return q, k, v


def _has_kernel(first: mx.array, *others: mx.array) -> bool:
    """Whether there are kernels for arrays of this type, all of the same one."""
    is_half = first.dtype in (mx.bfloat16, mx.float16)
    return is_half and device.describe().kind == "cuda" and all(other.dtype == first.dtype for other in others)


@functools.cache
def _add_norm_kernel(dtype: mx.Dtype, width: int, eps: float) -> tuple[int, Kernel]:
    """Threads of a block, as MLX's kernel has them for this width, and the kernel."""
    vectors = -(-width // _LANE)
    if vectors <= 64 or (vectors % 128 and vectors % 64 == 0 and vectors <= 64 * 8):
        threads = 64
    else:
        threads = 128 if vectors <= _NARROW else 1024
    constants: Constants = {
        "T": dtype, "WIDTH": width, "EPS": eps, "THREADS": threads, "VECTORS": -(-vectors // threads),
    }  # fmt: skip
    return threads, Kernel("add_norm", ["x", "r", "weight"], ["sum", "normed"], _ADD_NORM, constants)


@functools.cache
def _split_kernel(
    dtype: mx.Dtype,
    dim: int,
    sizes: tuple[int, int, int, int],
    base: float | None,
    scale: float,
    eps: float | None,
) -> Kernel:
    constants: dict[str, int | float | mx.Dtype] = {"T": dtype, "D": dim, "SCALE": scale}
    constants |= zip(("H", "K", "LANES", "THREADS"), sizes, strict=True)
    inputs, source = ["product", "offsets"], _SPLIT
    if base is None:
        inputs, source = [*inputs, "freqs"], source.replace("FREQUENCY", "1.0f / freqs[d]")
    else:
        source, constants["BASE"] = source.replace("FREQUENCY", _FREQUENCY), math.log2(base)
    if eps is not None:
        inputs, constants["EPS"] = [*inputs, "q_weight", "k_weight"], eps
    source = source.replace("NORM", "" if eps is None else _NORM)
    return Kernel("split_heads", inputs, ["q", "k", "v"], source, constants)


def _split_by_mlx(
    product: mx.array, heads: int, kv_heads: int, rotation: Rotation, offsets: mx.array, norms: HeadNorms | None
) -> tuple[mx.array, mx.array, mx.array]:
    by_head = product.reshape(offsets.shape[0], -1, heads + 2 * kv_heads, product.shape[-1] // (heads + 2 * kv_heads))
    q, k, v = mx.split(by_head, [heads, heads + kv_heads], axis=2)
    if norms:
        q, k = (mx.fast.rms_norm(x, by, norms.eps) for x, by in ((q, norms.queries), (k, norms.keys)))
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))

    def rotated(x: mx.array) -> mx.array:
        return mx.fast.rope(
            x,
            x.shape[-1],
            traditional=False,
            base=rotation.base,
            scale=rotation.scale,
            offset=offsets,
            freqs=rotation.freqs,
        )

    return rotated(q), rotated(k), v
