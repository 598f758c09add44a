// Kernel of attention of many tokens per sequence. Compiled once per instruction set: LEVEL names it, LANES the floats
// of a vector.
//
// A lane has a query, and all that is computed of it: scores exist for the queries of some vectors and a block of keys
// only, and stay in a cache. What was weighed before a block has a larger score is scaled down (Milakov and Gimelshein
// 2018, online softmax; Dao et al. 2022, FlashAttention).
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int64_t TOKENS = 64;  // of a block
constexpr int SUMS = LANES == 16 ? 24 : 12;  // vectors of sums that are computed at once

// Vectors of queries, x [count, VECTORS * LANES], times weights: `count` for each of `outputs`, with strides. Added to
// out, [outputs, VECTORS * LANES], or in place of it.
template <int VECTORS, int OUTPUTS>
inline void tile(const float* x, int64_t count, const float* weights, int64_t apart, int64_t step, bool adds,
                 float* out) {
  Floats sums[OUTPUTS][VECTORS] = {};
  if (adds) __builtin_memcpy(sums, out, sizeof sums);
  for (int64_t i = 0; i < count; i++, weights += step, x += VECTORS * LANES) {
    Floats own[VECTORS];
    for (int v = 0; v < VECTORS; v++) own[v] = load<Floats>(x + v * LANES);
    for (int o = 0; o < OUTPUTS; o++) {
      const Floats weight = splat(weights[o * apart]);
      for (int v = 0; v < VECTORS; v++) sums[o][v] += weight * own[v];
    }
  }
  __builtin_memcpy(out, sums, sizeof sums);
}

template <int VECTORS>
void multiply(const float* x, int64_t count, const float* weights, int64_t apart, int64_t step, int64_t outputs,
              bool adds, float* out) {
  constexpr int OUTPUTS = SUMS / VECTORS;
  int64_t o = 0;
  for (; o + OUTPUTS <= outputs; o += OUTPUTS)
    tile<VECTORS, OUTPUTS>(x, count, weights + o * apart, apart, step, adds, out + o * VECTORS * LANES);
  for (; o < outputs; o++)
    tile<VECTORS, 1>(x, count, weights + o * apart, apart, step, adds, out + o * VECTORS * LANES);
}

// Some queries of a head, a lane each, and what they have seen: the largest score, the sum of the weights, which are
// exponentials of differences from it, and the weighted sum of the values.
template <int VECTORS>
struct Queries {
  static constexpr int64_t COUNT = VECTORS * LANES;
  alignas(64) float inputs[BlockAttention::MOST_DIM * COUNT];  // times the scale
  alignas(64) float totals[BlockAttention::MOST_DIM * COUNT];
  alignas(64) float scores[TOKENS * COUNT];
  Floats largest[VECTORS], sums[VECTORS];
};

// The weights of some tokens in place of their scores.
template <int VECTORS>
void soften(int64_t tokens, int64_t dim, Queries<VECTORS>& queries) {
  constexpr int64_t COUNT = Queries<VECTORS>::COUNT;
  for (int v = 0; v < VECTORS; v++) {
    float* scores = queries.scores + v * LANES;
    Floats top = queries.largest[v], sum = {};
    for (int64_t t = 0; t < tokens; t++) {
      const Floats own = load<Floats>(scores + t * COUNT);
      top = own > top ? own : top;
    }
    for (int64_t t = 0; t < tokens; t++) {
      const Floats weight = exponential(load<Floats>(scores + t * COUNT) - top);
      __builtin_memcpy(scores + t * COUNT, &weight, sizeof weight);
      sum += weight;
    }
    const Floats share = exponential(queries.largest[v] - top);
    queries.largest[v] = top;
    queries.sums[v] = queries.sums[v] * share + sum;
    for (int64_t d = 0; d < dim; d++) {
      float* total = queries.totals + d * COUNT + v * LANES;
      const Floats own = load<Floats>(total) * share;
      __builtin_memcpy(total, &own, sizeof own);
    }
  }
}

// Queries of a head as columns, times the scale: `count` of them, the last one in all lanes that are left.
template <int VECTORS>
void take(const float* q, int64_t apart, int64_t count, int64_t dim, float scale, Queries<VECTORS>& queries) {
  constexpr int64_t COUNT = Queries<VECTORS>::COUNT;
  for (int64_t first = 0; first < COUNT; first += LANES) {
    const float* rows[LANES];
    for (int64_t r = 0; r < LANES; r++) rows[r] = q + least(first + r, count - 1) * apart;
    float* out = queries.inputs + first;
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
      Floats block[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) block[r] = load<Floats>(rows[r] + d) * scale;
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) __builtin_memcpy(out + (d + r) * COUNT, &block[r], sizeof block[r]);
    }
    for (; d < dim; d++)
      for (int64_t r = 0; r < LANES; r++) out[d * COUNT + r] = rows[r][d] * scale;
  }
}

// The weighted means of the values that queries have seen.
template <int VECTORS>
void put(const Queries<VECTORS>& queries, int64_t count, int64_t dim, float* out, int64_t apart) {
  constexpr int64_t COUNT = Queries<VECTORS>::COUNT;
  for (int v = 0; v < VECTORS; v++) {
    const int64_t first = v * LANES, number = least(LANES, count - first);
    const Floats share = 1.0f / queries.sums[v];
    const float* totals = queries.totals + first;
    float* own = out + first * apart;
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
      Floats block[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) block[r] = load<Floats>(totals + (d + r) * COUNT) * share;
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++)
        if (r < number) __builtin_memcpy(own + r * apart + d, &block[r], sizeof block[r]);
    }
    for (; d < dim; d++)
      for (int64_t r = 0; r < number; r++) own[r * apart + d] = totals[d * COUNT + r] * share[r];
  }
}

// Add a mask's addends of some tokens to scores. apart: from one row of it to the next; 0 where all have the same.
template <int VECTORS>
void add_mask(const float* mask, int64_t apart, int64_t begin, int64_t end, int64_t count, float* scores) {
  constexpr int64_t COUNT = Queries<VECTORS>::COUNT;
  for (int64_t t = 0; t < count && !apart; t++)
    for (int64_t lane = 0; lane < COUNT; lane++) scores[t * COUNT + lane] += mask[t];
  for (int64_t lane = 0; lane < COUNT && apart; lane++)
    for (int64_t t = 0; t < count; t++) scores[t * COUNT + lane] += mask[least(begin + lane, end - 1) * apart + t];
}

// Queries of one head from `begin` to before `end`, of which VECTORS vectors have room.
template <int VECTORS>
void attend(const BlockAttention& p, int64_t batch, int64_t head, int64_t begin, int64_t end) {
  constexpr int64_t COUNT = Queries<VECTORS>::COUNT;
  Queries<VECTORS> queries;
  const int64_t group = head / (p.heads / p.groups), first_seen = p.is_causal ? p.tokens - p.length + 1 : p.tokens;
  const float* q = p.q + batch * p.q_strides[0] + head * p.q_strides[1];
  const float* keys = p.keys + batch * p.key_strides[0] + group * p.key_strides[1];
  const float* values = p.values + batch * p.value_strides[0] + group * p.value_strides[1];
  const float* mask = p.mask ? p.mask + batch * p.mask_strides[0] + head * p.mask_strides[1] : nullptr;
  take(q + begin * p.q_strides[2], p.q_strides[2], end - begin, p.dim, p.scale, queries);
  for (int v = 0; v < VECTORS; v++) queries.largest[v] = splat(2 * LOWEST), queries.sums[v] = Floats{};
  for (int64_t i = 0; i < p.value_dim * COUNT; i++) queries.totals[i] = 0.0f;
  const int64_t last = p.is_causal ? first_seen + end - 1 : p.tokens;
  for (int64_t token = 0; token < last; token += TOKENS) {
    const int64_t count = least(TOKENS, last - token);
    float* scores = queries.scores;
    multiply<VECTORS>(queries.inputs, p.dim, keys + token * p.key_strides[2], p.key_strides[2], 1, count, false, scores);
    if (mask) add_mask<VECTORS>(mask + token, p.mask_strides[2], begin, end, count, scores);
    for (int64_t lane = 0; lane < COUNT && p.is_causal; lane++) {
      const int64_t unseen = first_seen + least(begin + lane, end - 1) - token;
      for (int64_t t = unseen > 0 ? unseen : 0; t < count; t++) scores[t * COUNT + lane] = LOWEST;
    }
    soften(count, p.value_dim, queries);
    multiply<VECTORS>(scores, count, values + token * p.value_strides[2], 1, p.value_strides[2], p.value_dim, true,
                      queries.totals);
  }
  put(queries, end - begin, p.value_dim, p.out + ((batch * p.length + begin) * p.heads + head) * p.value_dim,
      p.heads * p.value_dim);
}

}  // namespace

extern "C" void NAME(block_attention)(const BlockAttention& p, int64_t first, int64_t last) noexcept {
  for (int64_t item = first; item < last; item++) {
    const int64_t all = item / p.parts(), batch = all / p.heads, head = all % p.heads;
    const int64_t begin = item % p.parts() * p.ROWS, end = least(begin + p.ROWS, p.length);
    for (int64_t row = begin; row < end;) {
      const int64_t left = end - row, vectors = (left + LANES - 1) / LANES;
      const int64_t taken = least(left, (vectors == 4 ? 2 : least(3, vectors)) * LANES);
      if (taken > 2 * LANES) attend<3>(p, batch, head, row, row + taken);
      else if (taken > LANES) attend<2>(p, batch, head, row, row + taken);
      else attend<1>(p, batch, head, row, row + taken);
      row += taken;
    }
  }
}
