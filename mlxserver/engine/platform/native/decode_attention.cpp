// Kernels of attention of few tokens per sequence. Compiled once per instruction set: LEVEL names it, LANES the floats of
// a vector.
//
// Its time is that of reading keys and values, so that those of a long sequence are cut into segments, which threads
// share, and are fetched while others are computed with. A segment has the largest score, the sum of the weights, which
// are exponentials of differences from it, and the weighted sum of the values; what was weighed before a larger score is
// scaled down (Milakov and Gimelshein 2018, online softmax; Dao et al. 2023, Flash-Decoding).
// Rule 1: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
// Rule 2: where segments begin depends on nothing but the token's number: results are the same on any number of threads,
//         and beside any other sequences.
#include "tiles.h"

namespace {

constexpr int64_t TOKENS = 64;  // of a block, whose values are fetched while its keys are computed with
constexpr float HIDDEN = -__builtin_inff();  // of tokens that a row does not see

inline void fetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i, 0, 3);
}

// Rows of a group, and what they have seen of a segment.
struct Rows {
  const float *q, *mask;  // [count, dim]; the sequence's mask, or null
  float* totals;          // of the first row, `apart` from the next one's
  int64_t begin, count, apart, tokens;  // tokens: that their sequence has
  float largest[Attention::ROWS];
  Floats sums[Attention::ROWS];
  alignas(64) float scores[Attention::ROWS * TOKENS];
};

// The scores of a block's tokens.
void score(const Attention& p, const float* keys, const float* values, int64_t count, Rows& rows) {
  const Product product{rows.q, nullptr, nullptr, rows.scores, rows.count, p.dim, TOKENS};
  for (int64_t t = 0; t < count; t += PANEL) {
    const int64_t own = least(PANEL, count - t);
    const float* weights = keys + t * p.dim;
    fetch(values + t * p.value_dim, own * p.value_dim);
    for (int64_t row = 0; row < rows.count; row += MOST)
      ::rows<float, MOST>(least(MOST, rows.count - row), product, weights, p.dim, row, t, own,
                          {0, p.dim, reinterpret_cast<const char*>(weights), 0});
  }
}

// A row's weights of tokens in place of their scores, of which it sees the first ones. Returns what its totals are
// multiplied by.
float soften(const Attention& p, int64_t token, int64_t count, int64_t row, Rows& rows) {
  float* scores = rows.scores + row * TOKENS;
  const int64_t own = (rows.begin + row) % p.length, last = p.is_causal ? rows.tokens - p.length + own + 1 : rows.tokens;
  const int64_t seen = last > token ? least(count, last - token) : 0, end = (count + LANES - 1) / LANES * LANES;
  const float* mask = rows.mask ? rows.mask + own * p.tokens + token : nullptr;
  for (int64_t t = seen; t < end; t++) scores[t] = HIDDEN;
  Floats top = splat(rows.largest[row]);
  for (int64_t t = 0; t < end; t += LANES) {
    Floats score = load<Floats>(scores + t) * p.scale;
    if (mask) score += load_some(mask + t, count - t, 0.0f);
    __builtin_memcpy(scores + t, &score, sizeof score);
    top = score > top ? score : top;
  }
  const float largest = most(top), share = exponential(splat(rows.largest[row] - largest))[0];
  Floats sum = rows.sums[row] * share;
  for (int64_t t = 0; t < end; t += LANES) {
    const Floats weight = exponential(load<Floats>(scores + t) - largest);
    __builtin_memcpy(scores + t, &weight, sizeof weight);
    sum += weight;
  }
  rows.largest[row] = largest, rows.sums[row] = sum;
  return share;
}

// Weighted sums of VECTORS vectors of a block's values, for ROWS rows; `ahead` are keys that are fetched meanwhile.
template <int ROWS, int VECTORS>
void weigh(const float* weights, int64_t count, const float* values, int64_t dim, const float* shares, float* out,
           int64_t apart, const float* ahead, int64_t fetched) {
  Floats totals[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < VECTORS; n++) totals[r][n] = load<Floats>(out + r * apart + n * LANES) * shares[r];
  for (int64_t t = 0; t < count; t++, ahead += fetched) {
    fetch(ahead, fetched);
    Floats own[VECTORS];
    for (int n = 0; n < VECTORS; n++) own[n] = load<Floats>(values + t * dim + n * LANES);
    for (int r = 0; r < ROWS; r++) {
      const Floats weight = splat(weights[r * TOKENS + t]);
      for (int n = 0; n < VECTORS; n++) totals[r][n] += weight * own[n];
    }
  }
  for (int r = 0; r < ROWS; r++) __builtin_memcpy(out + r * apart, totals[r], sizeof totals[r]);
}

template <int ROWS>
void weigh(const float* weights, int64_t count, const float* values, int64_t dim, const float* shares, float* out,
           int64_t apart, const float* ahead, int64_t fetched) {
  int64_t d = 0;
  for (; d + 4 * LANES <= dim; d += 4 * LANES, fetched = 0)
    weigh<ROWS, 4>(weights, count, values + d, dim, shares, out + d, apart, ahead, fetched);
  for (; d + LANES <= dim; d += LANES, fetched = 0)
    weigh<ROWS, 1>(weights, count, values + d, dim, shares, out + d, apart, ahead, fetched);
  for (; d < dim; d++)
    for (int r = 0; r < ROWS; r++) {
      float sum = out[r * apart + d] * shares[r];
      for (int64_t t = 0; t < count; t++) sum += weights[r * TOKENS + t] * values[t * dim + d];
      out[r * apart + d] = sum;
    }
}

template <int ROWS>
void weigh_rows(int64_t count, const float* weights, int64_t tokens, const float* values, int64_t dim,
                const float* shares, float* out, int64_t apart, const float* ahead, int64_t fetched) {
  if (count == ROWS) return weigh<ROWS>(weights, tokens, values, dim, shares, out, apart, ahead, fetched);
  if constexpr (ROWS > 1)
    weigh_rows<ROWS - 1>(count, weights, tokens, values, dim, shares, out, apart, ahead, fetched);
}

// Attention to the tokens from `begin` to before `end`.
void attend(const Attention& p, const float* keys, const float* values, int64_t begin, int64_t end, Rows& rows) {
  for (int64_t row = 0; row < rows.count; row++) {
    rows.largest[row] = LOWEST, rows.sums[row] = Floats{};
    for (int64_t d = 0; d < p.value_dim; d++) rows.totals[row * rows.apart + d] = 0.0f;
  }
  for (int64_t token = begin; token < end; token += TOKENS) {
    const int64_t count = least(TOKENS, end - token);
    const float *own = values + token * p.value_dim, *ahead = keys + (token + count) * p.dim;
    score(p, keys + token * p.dim, own, count, rows);
    for (int64_t row = 0; row < rows.count; row += MOST) {
      const int64_t taken = least(MOST, rows.count - row);
      float shares[MOST];
      for (int64_t r = 0; r < taken; r++) shares[r] = soften(p, token, count, row + r, rows);
      weigh_rows<MOST>(taken, rows.scores + row * TOKENS, count, own, p.value_dim, shares,
                       rows.totals + row * rows.apart, rows.apart, ahead, row || token + count == end ? 0 : p.dim);
    }
  }
}

void attention(const Attention& p, int64_t first, int64_t last) {
  Rows rows;
  for (int64_t item = first; item < last; item++) {
    const int64_t part = item % p.parts(), segment = item / p.parts() % p.segments();
    const int64_t all = item / p.parts() / p.segments(), batch = all / p.groups, group = all % p.groups;
    const bool is_whole = p.segments() == 1;
    rows.tokens = p.seen(batch);
    if (segment * p.SEGMENT >= rows.tokens) continue;
    rows.begin = part * p.ROWS, rows.count = least(p.ROWS, p.rows - rows.begin);
    rows.q = p.q + (all * p.rows + rows.begin) * p.dim;
    rows.mask = p.mask ? p.mask + batch * p.mask_stride : nullptr;
    rows.apart = is_whole ? p.value_dim : p.partial_width();
    rows.totals = is_whole ? p.out + (all * p.rows + rows.begin) * p.value_dim
                           : p.partial + ((all * p.segments() + segment) * p.rows + rows.begin) * p.partial_width();
    attend(p, p.keys + batch * p.key_strides[0] + group * p.key_strides[1],
           p.values + batch * p.value_strides[0] + group * p.value_strides[1], segment * p.SEGMENT,
           least(rows.tokens, (segment + 1) * p.SEGMENT), rows);
    for (int64_t row = 0; row < rows.count; row++) {
      float* own = rows.totals + row * rows.apart;
      const float sum = total(rows.sums[row]);
      if (is_whole)
        for (int64_t d = 0; d < p.value_dim; d++) own[d] /= sum;
      else own[p.value_dim] = rows.largest[row], own[p.value_dim + 1] = sum;
    }
  }
}

// The attention of rows from that of the segments.
void combine(const SegmentedAttention& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) {
    const int64_t apart = p.rows * p.partial_width(), dim = p.value_dim;
    const float* parts = p.partial + (row / p.rows * p.segments() * p.rows + row % p.rows) * p.partial_width();
    float *out = p.out + row * dim, largest = parts[dim], sum = 0.0f;
    const int64_t segments = (p.seen(row / p.rows / p.groups) + p.SEGMENT - 1) / p.SEGMENT;
    for (int64_t s = 1; s < segments; s++)
      if (parts[s * apart + dim] > largest) largest = parts[s * apart + dim];
    for (int64_t d = 0; d < dim; d++) out[d] = 0.0f;
    for (int64_t s = 0; s < segments; s++) {
      const float* own = parts + s * apart;
      const float share = exponential(splat(own[dim] - largest))[0];
      sum += own[dim + 1] * share;
      for (int64_t d = 0; d < dim; d++) out[d] += own[d] * share;
    }
    for (int64_t d = 0; d < dim; d++) out[d] /= sum;
  }
}

}  // namespace

extern "C" {
void NAME(attention)(const Attention& p, int64_t first, int64_t last) noexcept { attention(p, first, last); }
void NAME(combine)(const SegmentedAttention& p, int64_t first, int64_t last) noexcept { combine(p, first, last); }
}
