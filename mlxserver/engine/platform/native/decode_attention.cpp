// Kernels of attention of few tokens per sequence. Compiled once per instruction set: LEVEL names it, LANES the floats of
// a vector.
//
// Its time is that of reading keys and values, so that those of a long sequence are cut into segments, which threads
// share, and are fetched while others are computed with. Quantized ones are dequantized block by block. A segment has the
// largest score, the sum of the weights, which are exponentials of differences from it, and the weighted sum of the
// values; what was weighed before a larger score is scaled down (Milakov and Gimelshein 2018, online softmax; Dao et al.
// 2023, Flash-Decoding).
// Rule 1: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
// Rule 2: where segments begin depends on nothing but the token's number: results are the same on any number of threads,
//         and beside any other sequences.
#include "affine.h"
#include "tiles.h"

namespace {

constexpr int64_t TOKENS = 64;  // of a block, whose values are fetched while its keys are computed with
constexpr float HIDDEN = -__builtin_inff();  // of tokens that a row does not see

inline void fetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i, 0, 3);
}

// Rows of a group, and what they have seen of a segment.
struct Queries {
  const float *q, *mask;  // [count, dim]; the sequence's mask, or null
  float* totals;          // of the first row; those of the next one lie `apart` from it
  int64_t begin, count, apart, tokens;  // tokens: that their sequence has
  float largest[Attention::ROWS];
  Floats sums[Attention::ROWS];
  alignas(64) float scores[Attention::ROWS * TOKENS];
  alignas(64) float wide[Attention::MOST_DIM * TOKENS];  // a block's keys, and then its values, if they are quantized
};

// What is fetched, so much per token, while others are computed with.
struct Ahead {
  const float* from;
  int64_t each;
};

// Keys or values of a group.
struct Cached {
  const char *values, *scales, *biases;
  int bits, group;
  int64_t dim;

  Cached(const Stored& all, int64_t batch, int64_t number, int64_t dim)
      : values(at(all.values, batch, number)), scales(at(all.scales, batch, number)),
        biases(at(all.biases, batch, number)), bits(all.bits), group(all.group), dim(dim) {}

  // Those of a token and of the next ones, as they are.
  Ahead ahead(int64_t token) const {
    const int64_t each = dim * bits / 32;
    return {reinterpret_cast<const float*>(values) + token * each, each};
  }

  // Those of some tokens, where they are or in `room`.
  const float* wide(int64_t token, int64_t count, float* room) const {
    if (bits == 32) return ahead(token).from;
    if (bits == 4) dequantize<4>(token, count, room);
    else dequantize<8>(token, count, room);
    return room;
  }

 private:
  static const char* at(const Stored::Part& part, int64_t batch, int64_t number) {
    return static_cast<const char*>(part.data) + 4 * (batch * part.strides[0] + number * part.strides[1]);
  }

  template <int BITS>
  void dequantize(int64_t token, int64_t count, float* room) const {
    const int64_t groups = dim / group, first = token * groups;
    ::dequantize<BITS>(reinterpret_cast<const uint32_t*>(ahead(token).from),
                       reinterpret_cast<const float*>(scales) + first, reinterpret_cast<const float*>(biases) + first,
                       count * groups, group, room);
  }
};

// Values of a block's tokens.
struct Values {
  const float* values;
  int64_t count, dim;
  Ahead ahead;
};

// The scores of a block's tokens.
void score(const Attention& p, const float* keys, int64_t tokens, const Ahead& ahead, Queries& queries) {
  const Product product{queries.q, nullptr, nullptr, queries.scores, queries.count, p.dim, TOKENS};
  for (int64_t t = 0; t < tokens; t += PANEL) {
    const int64_t count = least(PANEL, tokens - t);
    const float* own = keys + t * p.dim;
    fetch(ahead.from + t * ahead.each, count * ahead.each);
    for (int64_t row = 0; row < queries.count; row += MOST)
      rows<float, MOST>(least(MOST, queries.count - row), product, own, p.dim, row, t, count,
                        {0, p.dim, reinterpret_cast<const char*>(own)});
  }
}

// A row's weights of some tokens, of which it sees the first ones, in place of their scores. Returns what the totals of
// earlier ones are to be multiplied by.
float soften(const Attention& p, int64_t token, int64_t count, int64_t row, Queries& queries) {
  float* scores = queries.scores + row * TOKENS;
  const int64_t own = (queries.begin + row) % p.length;
  const int64_t last = p.is_causal ? queries.tokens - p.length + own + 1 : queries.tokens;
  const int64_t seen = last > token ? least(count, last - token) : 0;
  const float* mask = queries.mask ? queries.mask + own * p.tokens + token : nullptr;
  for (int64_t t = seen; t < TOKENS; t++) scores[t] = HIDDEN;
  Floats top = splat(queries.largest[row]);
  for (int64_t t = 0; t < count; t += LANES) {
    Floats score = load<Floats>(scores + t) * p.scale;
    if (mask) score += load_some(mask + t, count - t, 0.0f);
    __builtin_memcpy(scores + t, &score, sizeof score);
    top = score > top ? score : top;
  }
  const float largest = most(top), share = exponential(splat(queries.largest[row] - largest))[0];
  Floats sum = queries.sums[row] * share;
  for (int64_t t = 0; t < count; t += LANES) {
    const Floats weight = exponential(load<Floats>(scores + t) - largest);
    __builtin_memcpy(scores + t, &weight, sizeof weight);
    sum += weight;
  }
  queries.largest[row] = largest, queries.sums[row] = sum;
  return share;
}

// Some totals of ROWS rows, with the weighted values of a block: VECTORS vectors of each row from `d` on.
template <int ROWS, int VECTORS>
void weigh(const Values& block, const float* weights, const float* shares, int64_t d, float* out, int64_t apart) {
  Floats totals[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < VECTORS; n++) totals[r][n] = load<Floats>(out + r * apart + d + n * LANES) * shares[r];
  const float *values = block.values + d, *ahead = block.ahead.from;
  const int64_t fetched = d ? 0 : block.ahead.each;
  for (int64_t t = 0; t < block.count; t++, values += block.dim, ahead += fetched) {
    fetch(ahead, fetched);
    Floats own[VECTORS];
    for (int n = 0; n < VECTORS; n++) own[n] = load<Floats>(values + n * LANES);
    for (int r = 0; r < ROWS; r++) {
      const Floats weight = splat(weights[r * TOKENS + t]);
      for (int n = 0; n < VECTORS; n++) totals[r][n] += weight * own[n];
    }
  }
  for (int r = 0; r < ROWS; r++) __builtin_memcpy(out + r * apart + d, totals[r], sizeof totals[r]);
}

template <int ROWS>
void weigh(int64_t count, const Values& block, const float* weights, const float* shares, float* out, int64_t apart) {
  if constexpr (ROWS > 1)
    if (count < ROWS) return weigh<ROWS - 1>(count, block, weights, shares, out, apart);
  int64_t d = 0;
  for (; d + 4 * LANES <= block.dim; d += 4 * LANES) weigh<ROWS, 4>(block, weights, shares, d, out, apart);
  for (; d + LANES <= block.dim; d += LANES) weigh<ROWS, 1>(block, weights, shares, d, out, apart);
  for (; d < block.dim; d++)
    for (int r = 0; r < ROWS; r++) {
      float sum = out[r * apart + d] * shares[r];
      for (int64_t t = 0; t < block.count; t++) sum += weights[r * TOKENS + t] * block.values[t * block.dim + d];
      out[r * apart + d] = sum;
    }
}

// Attention to the tokens from `begin` to before `end`.
void attend(const Attention& p, const Cached& keys, const Cached& values, int64_t begin, int64_t end, Queries& queries) {
  for (int64_t row = 0; row < queries.count; row++) {
    queries.largest[row] = LOWEST, queries.sums[row] = Floats{};
    for (int64_t d = 0; d < p.value_dim; d++) queries.totals[row * queries.apart + d] = 0.0f;
  }
  for (int64_t token = begin; token < end; token += TOKENS) {
    const int64_t count = least(TOKENS, end - token);
    score(p, keys.wide(token, count, queries.wide), count, values.ahead(token), queries);
    Values block{values.wide(token, count, queries.wide), count, p.value_dim, keys.ahead(token + count)};
    if (token + count == end) block.ahead.each = 0;
    for (int64_t row = 0; row < queries.count; row += MOST, block.ahead.each = 0) {
      const int64_t taken = least(MOST, queries.count - row);
      float shares[MOST];
      for (int64_t r = 0; r < taken; r++) shares[r] = soften(p, token, count, row + r, queries);
      weigh<MOST>(taken, block, queries.scores + row * TOKENS, shares, queries.totals + row * queries.apart,
                  queries.apart);
    }
  }
}

void attention(const Attention& p, int64_t first, int64_t last) {
  Queries queries;
  for (int64_t item = first; item < last; item++) {
    const int64_t part = item % p.parts(), segment = item / p.parts() % p.segments();
    const int64_t all = item / p.parts() / p.segments(), batch = all / p.groups, group = all % p.groups;
    const bool is_whole = p.segments() == 1;
    queries.tokens = p.seen(batch);
    if (segment * p.SEGMENT >= queries.tokens) continue;
    queries.begin = part * p.ROWS, queries.count = least(p.ROWS, p.rows - queries.begin);
    queries.q = p.q + (all * p.rows + queries.begin) * p.dim;
    queries.mask = p.mask ? p.mask + batch * p.mask_stride : nullptr;
    queries.apart = is_whole ? p.value_dim : p.partial_width();
    queries.totals = is_whole ? p.out + (all * p.rows + queries.begin) * p.value_dim
                           : p.partial + ((all * p.segments() + segment) * p.rows + queries.begin) * p.partial_width();
    attend(p, Cached(p.keys, batch, group, p.dim), Cached(p.values, batch, group, p.value_dim), segment * p.SEGMENT,
           least(queries.tokens, (segment + 1) * p.SEGMENT), queries);
    for (int64_t row = 0; row < queries.count; row++) {
      float* own = queries.totals + row * queries.apart;
      const float sum = total(queries.sums[row]);
      if (is_whole)
        for (int64_t d = 0; d < p.value_dim; d++) own[d] /= sum;
      else own[p.value_dim] = queries.largest[row], own[p.value_dim + 1] = sum;
    }
  }
}

// The attention of rows from that of the segments.
void combine(const SegmentedAttention& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) {
    const int64_t apart = p.rows * p.partial_width(), dim = p.value_dim;
    const float* parts = p.partial + (row / p.rows * p.segments() * p.rows + row % p.rows) * p.partial_width();
    const int64_t segments = (p.seen(row / p.rows / p.groups) + p.SEGMENT - 1) / p.SEGMENT;
    float *out = p.out + row * dim, largest = parts[dim], sum = 0.0f;
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
