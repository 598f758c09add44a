// Kernel of attention of many tokens per sequence. Compiled once per instruction set: LEVEL names it, LANES the floats
// of a vector.
//
// Scores exist for some queries and a block of keys only, and stay in a cache. What was weighed before a block has a
// larger score is scaled down (Milakov and Gimelshein 2018, online softmax; Dao et al. 2022, FlashAttention).
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int MOST = 6, VECTORS = 2;      // rows and vectors of a product that are computed at once
constexpr int64_t WIDTH = VECTORS * LANES;
constexpr int64_t TOKENS = 128;           // of a block, or fewer if keys have many dimensions
constexpr int64_t GAP = 16;               // behind the tokens of a dimension: caches collide at powers of two
constexpr int64_t BUFFER = BlockAttention::MOST_DIM * (WIDTH + GAP);


// A matrix's first element, and elements from one row to the next.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;
};

// ROWS rows of `a` times COUNT vectors of `b`, plus the factor of a row times what is in `c`, or without factors.
template <int ROWS, int COUNT>
inline void tile(Matrix<const float> a, Matrix<const float> b, int64_t depth, const float* factors, Matrix<float> c) {
  Floats sums[ROWS][COUNT] = {};
  for (int64_t i = 0; i < depth; i++) {
    Floats own[COUNT];
    for (int n = 0; n < COUNT; n++) own[n] = load<Floats>(b.data + i * b.stride + n * LANES);
    for (int r = 0; r < ROWS; r++) {
      const Floats x = splat(a.data[r * a.stride + i]);
      for (int n = 0; n < COUNT; n++) sums[r][n] += x * own[n];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < COUNT; n++) {
      float* to = c.data + r * c.stride + n * LANES;
      if (factors) sums[r][n] += load<Floats>(to) * factors[r];
      __builtin_memcpy(to, &sums[r][n], sizeof(Floats));
    }
}

template <int ROWS>
void multiply(Matrix<const float> a, Matrix<const float> b, int64_t depth, const float* factors, Matrix<float> c,
              int64_t width) {
  int64_t n = 0;
  for (; n + WIDTH <= width; n += WIDTH)
    tile<ROWS, VECTORS>(a, {b.data + n, b.stride}, depth, factors, {c.data + n, c.stride});
  for (; n + LANES <= width; n += LANES)
    tile<ROWS, 1>(a, {b.data + n, b.stride}, depth, factors, {c.data + n, c.stride});
  for (; n < width; n++)
    for (int r = 0; r < ROWS; r++) {
      float sum = factors ? c.data[r * c.stride + n] * factors[r] : 0.0f;
      for (int64_t i = 0; i < depth; i++) sum += a.data[r * a.stride + i] * b.data[i * b.stride + n];
      c.data[r * c.stride + n] = sum;
    }
}

// The product of up to ROWS rows.
template <int ROWS>
void multiply_rows(int count, Matrix<const float> a, Matrix<const float> b, int64_t depth, const float* factors,
                   Matrix<float> c, int64_t width) {
  if (count == ROWS) return multiply<ROWS>(a, b, depth, factors, c, width);
  if constexpr (ROWS > 1) multiply_rows<ROWS - 1>(count, a, b, depth, factors, c, width);
}

// A row's largest score so far, and the sum of its weights, which are exponentials of differences from that.
struct Row {
  float top = LOWEST, sum = 0.0f;
};

// Weights in place of the scores of `seen` tokens, and 0 for those up to `tokens`. Returns the factor of earlier ones.
float soften(float* scores, int64_t seen, int64_t tokens, float scale, const float* mask, Row& row) {
  Floats largest = splat(row.top), sum = {};
  for (int64_t t = 0; t < seen; t += LANES) {
    const int64_t rest = seen - t;
    Floats own = load_some(scores + t, rest, LOWEST) * scale;
    if (mask) own += load_some(mask + t, rest, 0.0f);
    store_some(own, rest, scores + t);
    largest = own > largest ? own : largest;
  }
  const float top = most(largest);
  for (int64_t t = 0; t < seen; t += LANES) {
    const int64_t rest = seen - t;
    const Floats own = exponential(load_some(scores + t, rest, LOWEST) - top);
    store_some(own, rest, scores + t);
    sum += rest >= LANES ? own : load_some(scores + t, rest, 0.0f);
  }
  for (int64_t t = seen; t < tokens; t++) scores[t] = 0.0f;
  const float factor = exponential(splat(row.top - top))[0];
  row = {top, row.sum * factor + total(sum)};
  return factor;
}

// Some keys, transposed, with zeros up to a whole number of vectors.
void transpose(Matrix<const float> keys, int64_t tokens, int64_t dim, Matrix<float> out) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t d = 0; d < dim; d++) out.data[d * out.stride + t] = keys.data[t * keys.stride + d];
  for (int64_t t = tokens; t < (tokens + WIDTH - 1) / WIDTH * WIDTH; t++)
    for (int64_t d = 0; d < dim; d++) out.data[d * out.stride + t] = 0.0f;
}

// Some queries of one head, [begin, end) of its tokens.
void attend(const BlockAttention& p, int64_t batch, int64_t head, int64_t begin, int64_t end) {
  alignas(64) float buffer[BUFFER], scores[MOST * TOKENS];
  Row state[BlockAttention::ROWS];
  const int64_t group = head / (p.heads / p.groups), hidden = p.is_causal ? p.tokens - p.length + 1 : p.tokens;
  const float* q = p.q + batch * p.q_strides[0] + head * p.q_strides[1];
  const float* keys = p.keys + batch * p.key_strides[0] + group * p.key_strides[1];
  const float* values = p.values + batch * p.value_strides[0] + group * p.value_strides[1];
  const float* mask = p.mask ? p.mask + batch * p.mask_strides[0] + head * p.mask_strides[1] : nullptr;
  float* out = p.out + (batch * p.length * p.heads + head) * p.value_dim;
  const int64_t size = least(TOKENS, (BUFFER / p.dim - GAP) / WIDTH * WIDTH);
  const Matrix<float> transposed{buffer, size + GAP};
  const int64_t stride = p.heads * p.value_dim, last = p.is_causal ? hidden + end - 1 : p.tokens;
  for (int64_t block = 0; block < last; block += size) {
    const int64_t tokens = least(size, last - block);
    transpose({keys + block * p.key_strides[2], p.key_strides[2]}, tokens, p.dim, transposed);
    for (int64_t row = begin; row < end; row += MOST) {
      const int count = int(least(MOST, end - row));
      const int64_t most = least(tokens, (p.is_causal ? hidden + row + count - 1 : p.tokens) - block);
      if (most <= 0) continue;
      multiply_rows<MOST>(count, {q + row * p.q_strides[2], p.q_strides[2]}, {buffer, size + GAP}, p.dim, nullptr,
                          {scores, TOKENS}, (most + WIDTH - 1) / WIDTH * WIDTH);
      float factors[MOST];
      for (int r = 0; r < count; r++) {
        int64_t seen = least(most, p.is_causal ? hidden + row + r - block : most);
        if (seen < 0) seen = 0;
        const float* own = mask ? mask + (row + r) * p.mask_strides[2] + block : nullptr;
        factors[r] = soften(scores + r * TOKENS, seen, most, p.scale, own, state[row + r - begin]);
      }
      multiply_rows<MOST>(count, {scores, TOKENS}, {values + block * p.value_strides[2], p.value_strides[2]}, most,
                          block ? factors : nullptr, {out + row * stride, stride}, p.value_dim);
    }
  }
  for (int64_t row = begin; row < end; row++)
    for (int64_t d = 0; d < p.value_dim; d++) out[row * stride + d] /= state[row - begin].sum;
}

}  // namespace

extern "C" void NAME(block_attention)(const BlockAttention& p, int64_t first, int64_t last) noexcept {
  for (int64_t item = first; item < last; item++) {
    const int64_t all = item / p.parts(), each = (p.length + p.parts() - 1) / p.parts();
    const int64_t begin = item % p.parts() * each;
    attend(p, all / p.heads, all % p.heads, begin, least(begin + each, p.length));
  }
}
