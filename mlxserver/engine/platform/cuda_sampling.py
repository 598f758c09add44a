"""CUDA kernel that draws one token per sequence: temperature, top_p, top_k, min_p and the draw in one launch.

MLX finds the most likely tokens of a row by sorting it as a whole: with 32 rows of 128,256 tokens and top_p, sampling
took as long as the forward pass of a model of 1B. Here a block of threads has a row, and finds the least weight to keep
by its digits, from the highest one on (radix selection, as in Alabi et al. 2012), in a histogram of counts and sums.

Rule: weights are integers, so that sums do not depend on the order of threads, and a draw not on the rest of the batch.
"""

from __future__ import annotations

import functools

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform.cuda_kernels import Constants, Kernel

_THREADS = 1024
SETTINGS = 4  # of a row: 1 / temperature, 0 for the likeliest token; top_p; min_p; top_k

# Block x: row x. A weight is the probability over that of the likeliest token, in units of 2^-32.
_DRAW = """
constexpr int WARPS = THREADS / 32, AHEAD = 8;  // values that a thread reads before it uses them
constexpr float ONE = 4294967040.0f;  // the largest float below 2^32
typedef unsigned long long Mass;
const int row = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
const int vocab = logits_shape[1];
const T* own = logits + (size_t)row * vocab;
const float inverse = settings[row * 4], top_p = settings[row * 4 + 1], min_p = settings[row * 4 + 2];
const unsigned top_k = static_cast<unsigned>(settings[row * 4 + 3]);
__shared__ float mosts[WARPS];
__shared__ int bests[WARPS];
__shared__ Mass totals[WARPS], masses[256], mass_above;
__shared__ unsigned counts[256], count_above, prefix;

float most = -INFINITY;
int best = vocab;
for (int at = thread; at < vocab; at += THREADS * AHEAD) {
  float x[AHEAD];
  #pragma unroll
  for (int n = 0; n < AHEAD; n++) {
    const int next = at + n * THREADS;
    x[n] = next < vocab ? static_cast<float>(own[next]) : -INFINITY;
  }
  #pragma unroll
  for (int n = 0; n < AHEAD; n++) if (x[n] > most) { most = x[n]; best = at + n * THREADS; }
}
#pragma unroll
for (int other = 16; other; other /= 2) {
  const float theirs = __shfl_xor_sync(0xffffffffu, most, other);
  const int index = __shfl_xor_sync(0xffffffffu, best, other);
  if (theirs > most || (theirs == most && index < best)) { most = theirs; best = index; }
}
if (lane == 0) { mosts[warp] = most; bests[warp] = best; }
__syncthreads();
for (int w = 0; w < WARPS; w++)
  if (mosts[w] > most || (mosts[w] == most && bests[w] < best)) { most = mosts[w]; best = bests[w]; }
if (inverse == 0 || !(fabsf(most) < INFINITY)) {  // greedy, or nothing to draw from
  if (thread == 0) out[row] = best < vocab ? best : 0;
  return;
}

auto weight_of = [&](float x) -> unsigned {
  const float share = expf((x - most) * inverse);
  return share > 0 ? __float2uint_rn(fminf(share, 1.0f) * ONE) : 0;
};
auto for_each = [&](int first, int step, int stop, auto use) {
  for (int at = first; at < stop; at += step * AHEAD) {
    float x[AHEAD];
    #pragma unroll
    for (int n = 0; n < AHEAD; n++) x[n] = at + n * step < stop ? static_cast<float>(own[at + n * step]) : -INFINITY;
    #pragma unroll
    for (int n = 0; n < AHEAD; n++) use(weight_of(x[n]));
  }
};
auto total_of = [&](Mass sum) -> Mass {  // of all threads; totals[] has that of each warp
  #pragma unroll
  for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  if (lane == 0) totals[warp] = sum;
  __syncthreads();
  Mass all = 0;
  for (int w = 0; w < WARPS; w++) all += totals[w];
  return all;
};

unsigned least = max(1u, __float2uint_rn(min_p * ONE));
if (top_p < 1 || top_k < vocab) {
  Mass sum = 0;
  for_each(thread, THREADS, vocab, [&](unsigned weight) { sum += weight; });
  const Mass all = total_of(sum);
  // A weight is kept while those above it have less than top_p of the mass, and are fewer than top_k.
  const Mass limit = top_p < 1 ? max(static_cast<Mass>(ceil(static_cast<double>(top_p) * all)), 1ull) : ~0ull;
  if (thread == 0) { mass_above = 0; count_above = 0; prefix = 0; }
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (thread < 256) { masses[thread] = 0; counts[thread] = 0; }
    __syncthreads();
    int digit = -1;
    Mass mass = 0;
    unsigned count = 0;
    const unsigned above = prefix;
    for_each(thread, THREADS, vocab, [&](unsigned weight) {
      if (weight == 0 || (shift < 24 && weight >> (shift + 8) != above)) return;
      const int next = weight >> shift & 255;
      if (next != digit) {
        if (count) { atomicAdd(&masses[digit], mass); atomicAdd(&counts[digit], count); }
        digit = next;
        mass = 0;
        count = 0;
      }
      mass += weight;
      count++;
    });
    if (count) { atomicAdd(&masses[digit], mass); atomicAdd(&counts[digit], count); }
    __syncthreads();
    if (warp == 0) {  // each lane has eight digits, the first one the highest
      Mass mine = 0, before;
      unsigned number = 0, ahead;
      for (int n = 0; n < 8; n++) { mine += masses[255 - lane * 8 - n]; number += counts[255 - lane * 8 - n]; }
      before = mine;
      ahead = number;
      #pragma unroll
      for (int other = 1; other < 32; other *= 2) {
        const Mass theirs = __shfl_up_sync(0xffffffffu, before, other);
        const unsigned its = __shfl_up_sync(0xffffffffu, ahead, other);
        if (lane >= other) { before += theirs; ahead += its; }
      }
      before += mass_above - mine;
      ahead += count_above - number;
      int found = -1;
      Mass found_mass = 0;
      unsigned found_count = 0;
      for (int n = 0; n < 8; n++) {
        const int bin = 255 - lane * 8 - n;
        if (counts[bin] && before < limit && ahead < top_k) { found = bin; found_mass = before; found_count = ahead; }
        before += masses[bin];
        ahead += counts[bin];
      }
      const unsigned finders = __ballot_sync(0xffffffffu, found >= 0);
      if (finders && lane == 31 - __clz(finders)) {
        prefix = above << 8 | found;
        mass_above = found_mass;
        count_above = found_count;
      }
    }
    __syncthreads();
  }
  least = max(least, prefix);
}

// Each warp has a piece of the vocabulary, in order.
const int piece = (vocab + WARPS - 1) / WARPS, start = warp * piece, stop = min(vocab, start + piece);
Mass kept = 0;
__syncthreads();
for_each(start + lane, 32, stop, [&](unsigned weight) { if (weight >= least) kept += weight; });
const Mass all = total_of(kept);
const Mass target = min(static_cast<Mass>(static_cast<double>(uniforms[row]) * all), all - 1);
Mass before = 0;
for (int w = 0; w < warp; w++) before += totals[w];
if (target < before || target >= before + totals[warp]) return;
for (int at = start; at < stop; at += 32) {
  const unsigned weight = at + lane < stop ? weight_of(static_cast<float>(own[at + lane])) : 0;
  Mass sum = weight >= least ? weight : 0;
  #pragma unroll
  for (int other = 1; other < 32; other *= 2) {
    const Mass theirs = __shfl_up_sync(0xffffffffu, sum, other);
    if (lane >= other) sum += theirs;
  }
  const unsigned beyond = __ballot_sync(0xffffffffu, before + sum > target);
  if (beyond) {
    if (lane == __ffs(beyond) - 1) out[row] = at + lane;
    return;
  }
  before += __shfl_sync(0xffffffffu, sum, 31);
}
"""


def draw(logits: mx.array, settings: mx.array, uniforms: mx.array) -> mx.array:
    """Draw a token per row from what its settings keep; the likeliest where nothing can be drawn: [batch] of uint32.

    logits: [batch, vocab] of any float type. settings: [batch, SETTINGS] of float32. uniforms: [batch, 1] of float32,
    in [0, 1): where in the cumulative distribution, in the order of the vocabulary, the token is.
    """
    batch = logits.shape[0]
    outputs = [((batch,), mx.uint32)]
    return _kernel(logits.dtype)([logits, settings, uniforms], outputs, blocks=(batch, 1, 1), threads=_THREADS)[0]


@functools.cache
def _kernel(dtype: mx.Dtype) -> Kernel:
    constants: Constants = {"T": dtype, "THREADS": _THREADS}
    return Kernel("draw_tokens", ["logits", "settings", "uniforms"], ["out"], _DRAW, constants)
