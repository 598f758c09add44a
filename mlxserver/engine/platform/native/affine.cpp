// Kernels of vectors in MLX's affine format. Compiled once per instruction set: LEVEL names it, LANES the floats of a
// vector.
//
// A group's value of the larger magnitude, its edge, is a whole number of scales away from 0, or is taken for 0.
// Rule 1: each operation of quantize() is MLX's, in its order: what a cache holds does not depend on who has written it.
// Rule 2: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "affine.h"
#include "kernel.h"

namespace {

// The smallest and the largest of a group's values; NaN is neither.
inline void find_ends(const float* x, int group, float& low, float& high) {
  Floats lows = splat(__builtin_inff()), highs = -lows;
  for (int i = 0; i < group; i += LANES) {
    const Floats own = load<Floats>(x + i);
    lows = own < lows ? own : lows;
    highs = highs < own ? own : highs;
  }
  float low_of[LANES], high_of[LANES];
  __builtin_memcpy(low_of, &lows, sizeof lows);
  __builtin_memcpy(high_of, &highs, sizeof highs);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) {
      low_of[i] = low_of[i + width] < low_of[i] ? low_of[i + width] : low_of[i];
      high_of[i] = high_of[i] < high_of[i + width] ? high_of[i + width] : high_of[i];
    }
  low = low_of[0], high = high_of[0];
}

template <int BITS>
void quantize(const Quantization& p, int64_t n) {
  constexpr float BINS = (1 << BITS) - 1;
  constexpr int PER_BYTE = 8 / BITS;
  const int group = p.group;
  const float* x = p.x + n * group;
  float low, high;
  find_ends(x, group, low, high);
  const bool is_low = __builtin_fabsf(low) > __builtin_fabsf(high);
  const float edge = is_low ? low : high, width = (high - low) / BINS;
  float scale = width < 1e-7f ? 1e-7f : width, bias = 0.0f;
  if (!is_low) scale = -scale;
  const float steps = __builtin_rintf(edge / scale);
  if (steps != 0.0f) scale = edge / steps, bias = edge;
  uint8_t values[Quantization::MOST_GROUP];
  for (int i = 0; i < group; i++) {
    float own = __builtin_rintf((x[i] - bias) / scale);
    own = own > 0.0f ? own : 0.0f;
    own = own < BINS ? own : BINS;
    values[i] = uint8_t(int32_t(own));
  }
  uint8_t* bytes = reinterpret_cast<uint8_t*>(p.words) + n * group / PER_BYTE;  // words are little-endian
  for (int i = 0; i < group / PER_BYTE; i++) bytes[i] = BITS == 8 ? values[i] : values[2 * i] | values[2 * i + 1] << 4;
  p.scales[n] = scale, p.biases[n] = bias;
}

}  // namespace

extern "C" void NAME(quantize)(const Quantization& p, int64_t first, int64_t last) noexcept {
  for (int64_t n = first; n < last; n++)
    if (p.bits == 4) quantize<4>(p, n);
    else quantize<8>(p, n);
}

extern "C" void NAME(dequantize)(const Dequantization& p, int64_t first, int64_t last) noexcept {
  const uint32_t* words = p.words + first * p.group * p.bits / 32;
  const float *scales = p.scales + first, *biases = p.biases + first;
  float* out = p.out + first * p.group;
  if (p.bits == 4) dequantize<4>(words, scales, biases, last - first, p.group, out);
  else dequantize<8>(words, scales, biases, last - first, p.group, out);
}
