// Kernel of a product with quantized weights. Compiled once per instruction set: LEVEL names it, LANES the floats
// of a vector. Vectors are those of GCC and Clang, so one text has NEON, SSE2, AVX2 and AVX-512.
//
// A weight is dequantized as MLX does it, scale * quantized + bias in float32: what differs from a product with
// dequantized weights is the order of the additions.
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "tiles.h"

namespace {

constexpr int64_t SPAN = 64;         // groups of a panel whose scales are widened at once
constexpr int64_t MOST_DIRECT = 3;  // rows for which weights are dequantized in registers

template <typename T>
void widen(const void* values, int64_t begin, int64_t count, float* out) {
  const T* from = static_cast<const T*>(values) + begin;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats wide = load_widened(from + i);
    __builtin_memcpy(out + i, &wide, sizeof wide);
  }
  for (; i < count; i++) out[i] = widened(from[i]);
}

// Scales or biases as float32.
void widen(const void* values, int type, int64_t begin, int64_t count, float* out) {
  if (type == 0) widen<float>(values, begin, count, out);
  else if (type == 1) widen<Float16>(values, begin, count, out);
  else widen<BFloat16>(values, begin, count, out);
}

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

// Few rows: a vector has inputs of one output, and weights are dequantized in registers.
template <int BITS, int ROWS, int OUTPUTS>
void direct(const Quantized& p, int64_t row, int64_t output) {
  constexpr int STEP = LANES < PER_WORD<BITS> ? PER_WORD<BITS> : LANES;
  const int64_t groups = p.inputs / p.group, words = p.inputs / PER_WORD<BITS>;
  const float* x = p.x + row * p.inputs;
  const uint32_t* weights = p.words + output * words;
  float scales[OUTPUTS][SPAN], biases[OUTPUTS][SPAN];
  Floats sums[OUTPUTS][ROWS] = {};
  for (int64_t first = 0; first < groups; first += SPAN) {
    const int64_t last = least(first + SPAN, groups);
    for (int o = 0; o < OUTPUTS; o++) {
      widen(p.scales, p.type, (output + o) * groups + first, last - first, scales[o]);
      widen(p.biases, p.type, (output + o) * groups + first, last - first, biases[o]);
    }
    for (int64_t g = first; g < last; g++) {
      Floats scale[OUTPUTS], bias[OUTPUTS];
      for (int o = 0; o < OUTPUTS; o++) scale[o] = splat(scales[o][g - first]), bias[o] = splat(biases[o][g - first]);
      for (int i = 0; i < p.group; i += STEP, weights += STEP / PER_WORD<BITS>)
        for (int part = 0; part < STEP / LANES; part++, x += LANES) {
          Floats inputs[ROWS];
          for (int r = 0; r < ROWS; r++) inputs[r] = load<Floats>(x + r * p.inputs);
          for (int o = 0; o < OUTPUTS; o++) {
            Floats weight = quantized<BITS>(weights + o * words, part) * scale[o] + bias[o];
            for (int r = 0; r < ROWS; r++) sums[o][r] += weight * inputs[r];
          }
        }
    }
  }
  for (int o = 0; o < OUTPUTS; o++)
    for (int r = 0; r < ROWS; r++) p.out[(row + r) * p.outputs + output + o] = total(sums[o][r]);
}

template <int BITS, int ROWS>
void few(const Quantized& p, int64_t row, int64_t first, int64_t last) {
  int64_t output = first;
  for (; output + PANEL <= last; output += PANEL) direct<BITS, ROWS, PANEL>(p, row, output);
  for (; output < last; output++) direct<BITS, ROWS, 1>(p, row, output);
}

// Some inputs of one output's weights, dequantized.
template <int BITS>
void dequantize(const Quantized& p, int64_t output, int64_t from, int64_t depth, float* out) {
  constexpr int STEP = LANES < PER_WORD<BITS> ? PER_WORD<BITS> : LANES;
  const int64_t groups = p.inputs / p.group, count = depth / p.group;
  const uint32_t* words = p.words + (output * p.inputs + from) / PER_WORD<BITS>;
  float scales[SHALLOW / 32], biases[SHALLOW / 32];
  widen(p.scales, p.type, output * groups + from / p.group, count, scales);
  widen(p.biases, p.type, output * groups + from / p.group, count, biases);
  for (int64_t g = 0; g < count; g++) {
    const Floats scale = splat(scales[g]), bias = splat(biases[g]);
    for (int i = 0; i < p.group; i += STEP, words += STEP / PER_WORD<BITS>)
      for (int part = 0; part < STEP / LANES; part++, out += LANES) {
        const Floats weight = quantized<BITS>(words, part) * scale + bias;
        __builtin_memcpy(out, &weight, sizeof weight);
      }
  }
}

// Many rows: weights are dequantized once for a block of rows.
template <int BITS>
void many(const Quantized& p, int64_t first, int64_t last) {
  many(p, first, last, 128, [&](int64_t output, int64_t count, Part& part, float* panel) {
    for (int64_t o = 0; o < count; o++)
      dequantize<BITS>(p, output + o, part.from, part.depth, panel + o * WIDE_STRIDE);
    part.step = p.inputs / PER_WORD<BITS> * 4, part.bytes = FETCHED / PER_WORD<BITS> * 4;
    part.ahead = reinterpret_cast<const char*>(p.words + ((output + WIDE) * p.inputs + part.from) / PER_WORD<BITS>);
    return Weights{panel, WIDE_STRIDE};
  });
}

template <int BITS>
void outputs(const Quantized& p, int64_t first, int64_t last) {
  if (p.rows == 1) few<BITS, 1>(p, 0, first, last);
  else if (p.rows == 2) few<BITS, 2>(p, 0, first, last);
  else if (p.rows == MOST_DIRECT) few<BITS, 3>(p, 0, first, last);
  else many<BITS>(p, first, last);
}

}  // namespace

extern "C" void NAME(quantized)(const Quantized& p, int64_t first, int64_t last) noexcept {
  if (p.bits == 4) outputs<4>(p, first, last);
  else outputs<8>(p, first, last);
}
