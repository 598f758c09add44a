// Values in MLX's affine format as float32: scale * quantized + bias.
//
// Rule: everything here is in an unnamed namespace (vectors.h).
#pragma once
#include "vectors.h"

namespace {

template <int BITS>
constexpr int PER_WORD = 32 / BITS;

// LANES quantized weights of one output, from the first in a word on or from the LANES * part-th.
template <int BITS>
inline Floats quantized(const uint32_t* row, int part) {
#if LANES == 16
  if constexpr (BITS == 8)
    return __builtin_convertvector(reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(load<__m128i>(row))), Floats);
#elif LANES == 8
  if constexpr (BITS == 8)
    return __builtin_convertvector(reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((__m128i*)row))), Floats);
#endif
  Words words = Words{} + row[0], shifts;
  for (int n = 1; n < LANES / PER_WORD<BITS>; n++) {
    Words chosen;
    for (int lane = 0; lane < LANES; lane++) chosen[lane] = lane / PER_WORD<BITS> == n ? ~0u : 0u;
    words = (~chosen & words) | (chosen & row[n]);
  }
  for (int lane = 0; lane < LANES; lane++) shifts[lane] = BITS * (lane % PER_WORD<BITS>);
  return __builtin_convertvector(reinterpret_cast<Ints>((words >> (shifts + BITS * LANES * part)) & ((1u << BITS) - 1)), Floats);
}

// Groups of values, `group` each.
template <int BITS>
inline void dequantize(const uint32_t* words, const float* scales, const float* biases, int64_t groups, int group,
                       float* out) {
  constexpr int STEP = LANES < PER_WORD<BITS> ? PER_WORD<BITS> : LANES;
  for (int64_t g = 0; g < groups; g++) {
    const Floats scale = splat(scales[g]), bias = splat(biases[g]);
    for (int i = 0; i < group; i += STEP, words += STEP / PER_WORD<BITS>)
      for (int part = 0; part < STEP / LANES; part++, out += LANES) {
        const Floats value = quantized<BITS>(words, part) * scale + bias;
        __builtin_memcpy(out, &value, sizeof value);
      }
  }
}

}  // namespace
