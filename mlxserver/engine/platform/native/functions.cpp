// Kernels of what lies between the products of a layer: norms, SwiGLU, SiLU, GELU, rotary embedding. Compiled once per
// instruction set: LEVEL names it, LANES the floats of a vector.
//
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

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

void sum(const Sum& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += LANES)
    store_some(load_some(p.x + i, last - i, 0.0f) + load_some(p.y + i, last - i, 0.0f), last - i, p.out + i);
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

}  // namespace

extern "C" {
void NAME(norm)(const Norm& p, int64_t first, int64_t last) noexcept { norm(p, first, last); }
void NAME(gate)(const Gate& p, int64_t first, int64_t last) noexcept { gate(p, first, last); }
void NAME(sum)(const Sum& p, int64_t first, int64_t last) noexcept { sum(p, first, last); }
void NAME(layer_norm)(const LayerNorm& p, int64_t first, int64_t last) noexcept { layer_norm(p, first, last); }
void NAME(gelu)(const Gelu& p, int64_t first, int64_t last) noexcept { gelu(p, first, last); }
void NAME(swish)(const Swish& p, int64_t first, int64_t last) noexcept { swish(p, first, last); }
void NAME(rotation)(const Rotation& p, int64_t first, int64_t last) noexcept { rotation(p, first, last); }
}
