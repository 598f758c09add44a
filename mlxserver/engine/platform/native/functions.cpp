// Kernels of what lies between the products of a layer: norms, SwiGLU, SiLU, GELU, rotary embedding, attention of few tokens.
// Compiled once per instruction set: LEVEL names it, LANES the floats of a vector.
//
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int MOST = LANES == 16 ? 6 : 3;  // rows that are computed at once

void norm(const Norm& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) {
    const float* x = p.x + row * p.width;
    float* out = p.out + row * p.width;
    Floats sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= p.width; i += 4 * LANES)
      for (int n = 0; n < 4; n++) {
        const Floats own = load<Floats>(x + i + n * LANES);
        sums[n] += own * own;
      }
    for (; i < p.width; i += LANES) {
      const Floats own = load_some(x + i, p.width - i, 0.0f);
      sums[0] += own * own;
    }
    const float squares = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const float scale = 1.0f / __builtin_sqrtf(squares / float(p.width) + p.eps);
    for (i = 0; i < p.width; i += LANES) {
      const int64_t rest = p.width - i;
      store_some(load_some(x + i, rest, 0.0f) * scale * load_some(p.weight + i, rest, 0.0f), rest, out + i);
    }
  }
}

void gate(const Gate& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += LANES) {
    const Floats own = load_some(p.gate + i, last - i, 0.0f);
    store_some(own / (1.0f + exponential(-own)) * load_some(p.x + i, last - i, 0.0f), last - i, p.out + i);
  }
}

void layer_norm(const LayerNorm& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) {
    const float* x = p.x + row * p.width;
    float* out = p.out + row * p.width;
    Floats sums = {}, squares = {};
    for (int64_t i = 0; i < p.width; i += LANES) sums += load_some(x + i, p.width - i, 0.0f);
    const float mean = total(sums) / float(p.width);
    for (int64_t i = 0; i < p.width; i += LANES) {
      const Floats own = load_some(x + i, p.width - i, mean) - mean;
      squares += own * own;
    }
    const float scale = 1.0f / __builtin_sqrtf(total(squares) / float(p.width) + p.eps);
    for (int64_t i = 0; i < p.width; i += LANES) {
      const int64_t rest = p.width - i;
      Floats own = (load_some(x + i, rest, 0.0f) - mean) * scale * load_some(p.weight + i, rest, 0.0f);
      if (p.bias) own += load_some(p.bias + i, rest, 0.0f);
      store_some(own, rest, out + i);
    }
  }
}

// x times the normal distribution's share below it, with erf() to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
void gelu(const Gelu& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += LANES) {
    const Floats x = load_some(p.x + i, last - i, 0.0f), size = x < 0.0f ? -x : x;
    const Floats t = 1.0f / (1.0f + size * (0.3275911f * 0.70710678118654752f));
    Floats sum = splat(1.061405429f);
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    const Floats near = size < 40.0f ? size : splat(40.0f), tail = 0.5f * near * sum * t * exponential(-0.5f * x * x);
    store_some(x > 0.0f ? x - tail : x < 0.0f ? -tail : x, last - i, p.out + i);
  }
}

void swish(const Swish& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += LANES) {
    const Floats x = load_some(p.x + i, last - i, 0.0f);
    store_some(x / (1.0f + exponential(-x * (p.slope + p.cubic * x * x))), last - i, p.out + i);
  }
}

void rotation(const Rotation& p, int64_t first, int64_t last) {
  const int64_t half = p.dim / 2;
  for (int64_t row = first; row < last; row++) {
    const int64_t token = row % p.tokens, head = row / p.tokens % p.heads, batch = row / p.tokens / p.heads;
    const float* x = p.x + batch * p.strides[0] + head * p.strides[1] + token * p.strides[2];
    const float* cosines = p.cosines + batch * p.angles + token * half;
    const float* sines = p.sines + batch * p.angles * 2 + token * p.dim;
    float* out = p.out + row * p.dim;
    for (int64_t i = 0; i < half; i += LANES) {
      const int64_t rest = half - i;
      const Floats one = load_some(x + i, rest, 0.0f), other = load_some(x + half + i, rest, 0.0f);
      const Floats cosine = load_some(cosines + i, rest, 0.0f), sine = load_some(sines + half + i, rest, 0.0f);
      store_some(one * cosine - other * sine, rest, out + i);
      store_some(other * cosine + one * sine, rest, out + half + i);
    }
  }
}

// The weights of tokens, times their sum, in place of their scores. Returns the sum.
float soften(float* scores, int64_t tokens, float scale, const float* mask) {
  Floats largest = splat(LOWEST), sum = {};
  for (int64_t t = 0; t < tokens; t += LANES) {
    const int64_t rest = tokens - t;
    Floats own = load_some(scores + t, rest, LOWEST) * scale;
    if (mask) own += load_some(mask + t, rest, 0.0f);
    store_some(own, rest, scores + t);
    largest = own > largest ? own : largest;
  }
  const Floats top = splat(most(largest));
  for (int64_t t = 0; t < tokens; t += LANES) {
    const int64_t rest = tokens - t;
    const Floats own = exponential(load_some(scores + t, rest, LOWEST) - top);
    store_some(own, rest, scores + t);
    sum += rest >= LANES ? own : load_some(scores + t, rest, 0.0f);
  }
  return total(sum);
}

// Sums of VECTORS vectors of the tokens' values, for ROWS rows of weights.
template <int ROWS, int VECTORS>
void weigh(const float* weights, int64_t tokens, const float* values, int64_t dim, const float* sums, float* out) {
  Floats totals[ROWS][VECTORS] = {};
  for (int64_t t = 0; t < tokens; t++) {
    Floats own[VECTORS];
    for (int n = 0; n < VECTORS; n++) own[n] = load<Floats>(values + t * dim + n * LANES);
    for (int r = 0; r < ROWS; r++) {
      const Floats weight = splat(weights[r * tokens + t]);
      for (int n = 0; n < VECTORS; n++) totals[r][n] += weight * own[n];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < VECTORS; n++) {
      const Floats mean = totals[r][n] / sums[r];
      __builtin_memcpy(out + r * dim + n * LANES, &mean, sizeof mean);
    }
}

template <int ROWS>
void weigh(const float* weights, int64_t tokens, const float* values, int64_t dim, const float* sums, float* out) {
  int64_t d = 0;
  for (; d + 4 * LANES <= dim; d += 4 * LANES) weigh<ROWS, 4>(weights, tokens, values + d, dim, sums, out + d);
  for (; d + LANES <= dim; d += LANES) weigh<ROWS, 1>(weights, tokens, values + d, dim, sums, out + d);
  for (; d < dim; d++)
    for (int r = 0; r < ROWS; r++) {
      float sum = 0.0f;
      for (int64_t t = 0; t < tokens; t++) sum += weights[r * tokens + t] * values[t * dim + d];
      out[r * dim + d] = sum / sums[r];
    }
}

template <int ROWS>
void weigh_rows(int count, const Attention& p, const float* weights, const float* values, const float* sums,
                float* out) {
  if (count == ROWS) return weigh<ROWS>(weights, p.tokens, values, p.value_dim, sums, out);
  if constexpr (ROWS > 1) weigh_rows<ROWS - 1>(count, p, weights, values, sums, out);
}

void attention(const Attention& p, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; item++) {
    const int64_t all = item / p.parts(), batch = all / p.groups, group = all % p.groups;
    const int64_t begin = item % p.parts() * p.ROWS, end = least(begin + p.ROWS, p.rows);
    const float* values = p.values + batch * p.value_strides[0] + group * p.value_strides[1];
    const float* mask = p.mask ? p.mask + batch * p.mask_stride : nullptr;
    float *scores = p.scores + (all * p.rows + begin) * p.tokens, *out = p.out + all * p.rows * p.value_dim;
    const Dense product{{p.q + (all * p.rows + begin) * p.dim, nullptr, nullptr, scores, end - begin, p.dim, p.tokens},
                        p.keys + batch * p.key_strides[0] + group * p.key_strides[1], 0};
    NAME(dense)(product, 0, p.tokens);
    for (int64_t row = begin; row < end;) {
      const int count = int(least(MOST, end - row));
      float sums[MOST], *weights = scores + (row - begin) * p.tokens;
      for (int r = 0; r < count; r++) {
        const int64_t own = (row + r) % p.length, seen = p.is_causal ? p.tokens - p.length + own + 1 : p.tokens;
        sums[r] = soften(weights + r * p.tokens, seen, p.scale, mask ? mask + own * p.tokens : nullptr);
        for (int64_t t = seen; t < p.tokens; t++) weights[r * p.tokens + t] = 0.0f;
      }
      weigh_rows<MOST>(count, p, weights, values, sums, out + row * p.value_dim);
      row += count;
    }
  }
}

}  // namespace

extern "C" {
void NAME(norm)(const Norm& p, int64_t first, int64_t last) noexcept { norm(p, first, last); }
void NAME(gate)(const Gate& p, int64_t first, int64_t last) noexcept { gate(p, first, last); }
void NAME(layer_norm)(const LayerNorm& p, int64_t first, int64_t last) noexcept { layer_norm(p, first, last); }
void NAME(gelu)(const Gelu& p, int64_t first, int64_t last) noexcept { gelu(p, first, last); }
void NAME(swish)(const Swish& p, int64_t first, int64_t last) noexcept { swish(p, first, last); }
void NAME(rotation)(const Rotation& p, int64_t first, int64_t last) noexcept { rotation(p, first, last); }
void NAME(attention)(const Attention& p, int64_t first, int64_t last) noexcept { attention(p, first, last); }
}
