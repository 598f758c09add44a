// Kernel that quantizes vectors in MLX's affine format. Compiled once per instruction set: LEVEL names it, LANES the floats
// of a vector.
//
// A group's value of the larger magnitude, its edge, is a whole number of scales away from 0, or is taken for 0.
// Rule 1: each operation is MLX's, in its order: what a cache holds does not depend on who has written it.
// Rule 2: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

template <int BITS>
void quantize(const Quantization& p, int64_t n) {
  constexpr float BINS = (1 << BITS) - 1;
  constexpr int PER_WORD = 32 / BITS;
  const float* x = p.x + n * p.group;
  float low = __builtin_inff(), high = -low;
  for (int i = 0; i < p.group; i++) {
    high = high < x[i] ? x[i] : high;
    low = x[i] < low ? x[i] : low;
  }
  const bool is_low = __builtin_fabsf(low) > __builtin_fabsf(high);
  const float edge = is_low ? low : high, width = (high - low) / BINS;
  float scale = width < 1e-7f ? 1e-7f : width, bias = 0.0f;
  if (!is_low) scale = -scale;
  const float steps = __builtin_rintf(edge / scale);
  if (steps != 0.0f) scale = edge / steps, bias = edge;
  uint32_t* words = p.words + n * p.group / PER_WORD;
  for (int i = 0; i < p.group; i += PER_WORD) {
    uint32_t word = 0;
    for (int k = 0; k < PER_WORD; k++) {
      float own = __builtin_rintf((x[i + k] - bias) / scale);
      own = own > 0.0f ? own : 0.0f;
      own = own < BINS ? own : BINS;
      word |= uint32_t(own) << BITS * k;
    }
    words[i / PER_WORD] = word;
  }
  p.scales[n] = scale, p.biases[n] = bias;
}

}  // namespace

extern "C" void NAME(quantize)(const Quantization& p, int64_t first, int64_t last) noexcept {
  for (int64_t n = first; n < last; n++)
    if (p.bits == 4) quantize<4>(p, n);
    else quantize<8>(p, n);
}
