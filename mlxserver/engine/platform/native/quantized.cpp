// Kernel of a product with quantized weights. Compiled once per instruction set: LEVEL names it, LANES the floats
// of a vector. Vectors are those of GCC and Clang, so one text has NEON, SSE2, AVX2 and AVX-512.
//
// A weight is scale * quantized + bias in float32, as MLX dequantizes it. For few rows the products of a group are added
// up first and scaled then, and its bias is multiplied with the sum of its inputs: what differs from a product with
// dequantized weights is the order of the operations.
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "affine.h"
#include "tiles.h"

namespace {

constexpr int64_t SPAN = 64;  // groups whose scales are widened at once

// Scales or biases as float32.
template <typename T>
inline void widen(const void* values, int64_t begin, int64_t count, float* out) {
  const T* from = static_cast<const T*>(values) + begin;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats wide = load_widened(from + i);
    __builtin_memcpy(out + i, &wide, sizeof wide);
  }
  if (i < count && count >= LANES) {  // the last ones again
    const Floats wide = load_widened(from + count - LANES);
    __builtin_memcpy(out + count - LANES, &wide, sizeof wide);
  } else
    for (; i < count; i++) out[i] = widened(from[i]);
}

// A vector of words, or the first `count` of them and 0.
inline Words load_words(const uint32_t* from, int64_t count) {
  if (count >= LANES) return load<Words>(from);
#if LANES == 16
  return reinterpret_cast<Words>(_mm512_maskz_loadu_epi32((1u << count) - 1, from));
#elif LANES == 8
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i is_there = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lanes);
  return reinterpret_cast<Words>(_mm256_maskload_epi32((const int*)from, is_there));
#else
  Words words{};
  for (int64_t i = 0; i < count; i++) words[i] = from[i];
  return words;
#endif
}

// Of each lane the value that is chosen for it. A vector of four words is never of two groups.
inline Floats chosen(const float* values, Words choice) {
#if LANES == 16
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(choice), load<__m512>(values));
#elif LANES == 8
  return _mm256_permutevar8x32_ps(load<__m256>(values), reinterpret_cast<__m256i>(choice));
#else
  return splat(values[0]);
#endif
}

// The n-th weights of words, where they are: times 2^(BITS * n). The highest ones would be negative.
template <int BITS>
inline Floats in_place(Words words, int n) {
  constexpr uint32_t MASK = (1u << BITS) - 1;
  const Words taken = n == PER_WORD<BITS> - 1 ? words >> (32 - BITS) : words & (MASK << BITS * n);
  return __builtin_convertvector(reinterpret_cast<Ints>(taken), Floats);
}

// What in_place() has is multiplied by, to be the weight.
template <int BITS>
constexpr float in_place_scale(int n) {
  return n == PER_WORD<BITS> - 1 ? 1.0f : 1.0f / float(int64_t(1) << BITS * n);
}

// What all outputs of a product with few rows have in common.
struct Few {
  int64_t groups, words;   // of an output
  int64_t apart, sums_at;  // of spread rows: elements between two, and before the sums of groups
  int group_bits;          // 2^group_bits inputs are a group
  Words group_of_lane;     // of a vector of words, from the first one's group on

  Few(const Quantized& p, int64_t per_word)
      : groups(p.inputs / p.group), words(p.inputs / per_word), group_bits(__builtin_ctz(p.group)) {
    const Spread layout{nullptr, nullptr, p.rows, p.inputs, LANES, p.bits, p.group};
    apart = layout.size(), sums_at = layout.sums();
    for (int lane = 0; lane < LANES; lane++) group_of_lane[lane] = uint32_t(lane * per_word) >> group_bits;
  }
};

// Some groups' scales or biases of some outputs, and 0 for a vector behind them.
template <typename T, int OUTPUTS>
inline void widen_panel(const void* values, int64_t begin, int64_t apart, int64_t count, float (*out)[SPAN + LANES]) {
  const Floats none{};
  for (int o = 0; o < OUTPUTS; o++) {
    widen<T>(values, begin + o * apart, count, out[o]);
    __builtin_memcpy(out[o] + count, &none, sizeof none);
  }
}

// ROWS spread rows times OUTPUTS outputs.
template <typename T, int BITS, int ROWS, int OUTPUTS>
inline void direct(const Quantized& p, const Few& all, int64_t output) {
  constexpr int64_t BLOCK = LANES * PER_WORD<BITS>;
  const uint32_t* weights = p.words + output * all.words;
  float scales[OUTPUTS][SPAN + LANES], biases[OUTPUTS][SPAN + LANES];
  Floats sums[ROWS][OUTPUTS] = {};
  for (int64_t first = 0; first < all.groups; first += SPAN) {
    const int64_t count = least(SPAN, all.groups - first), end = (first + count) * p.group;
    widen_panel<T, OUTPUTS>(p.scales, output * all.groups + first, all.groups, count, scales);
    widen_panel<T, OUTPUTS>(p.biases, output * all.groups + first, all.groups, count, biases);
    for (int64_t g = 0; g < count; g += LANES)
      for (int r = 0; r < ROWS; r++) {
        const Floats of_inputs = load<Floats>(p.spread + r * all.apart + all.sums_at + first + g);
        for (int o = 0; o < OUTPUTS; o++) sums[r][o] += load<Floats>(biases[o] + g) * of_inputs;
      }
    const float* x = p.spread + first * p.group;
    const uint32_t* own = weights + first * p.group / PER_WORD<BITS>;
    for (int64_t left = count * p.group, done = 0; left > 0; left -= BLOCK, done += BLOCK, x += BLOCK, own += LANES) {
      Words words[OUTPUTS];
      Floats products[ROWS][OUTPUTS] = {};
      for (int o = 0; o < OUTPUTS; o++) {
        words[o] = load_words(own + o * all.words, left / PER_WORD<BITS>);
        __builtin_prefetch(own + (o + OUTPUTS) * all.words, 0, 2);
      }
#pragma GCC unroll 8
      for (int n = 0; n < PER_WORD<BITS>; n++)
        for (int o = 0; o < OUTPUTS; o++) {
          const Floats weight = in_place<BITS>(words[o], n);
          for (int r = 0; r < ROWS; r++) products[r][o] += weight * load<Floats>(x + r * all.apart + n * LANES);
        }
      for (int o = 0; o < OUTPUTS; o++) {
        const Floats scale = chosen(scales[o] + (done >> all.group_bits), all.group_of_lane);
        for (int r = 0; r < ROWS; r++) sums[r][o] += products[r][o] * scale;
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    float* out = p.out + r * p.outputs + output;
    if constexpr (OUTPUTS == 4) {
      const Quad quad = p.bias ? totals(sums[r]) + load<Quad>(p.bias + output) : totals(sums[r]);
      __builtin_memcpy(out, &quad, sizeof quad);
    } else {
      for (int o = 0; o < OUTPUTS; o++) out[o] = total(sums[r][o]) + (p.bias ? p.bias[output + o] : 0.0f);
    }
  }
}

template <typename T, int BITS, int ROWS>
void few(const Quantized& p, int64_t first, int64_t last) {
  constexpr int OUTPUTS = ROWS == 1 || LANES == 16 ? 4 : 2;  // as many as there are registers for
  const Few all(p, PER_WORD<BITS>);
  int64_t output = first;
  for (; output + OUTPUTS <= last; output += OUTPUTS) direct<T, BITS, ROWS, OUTPUTS>(p, all, output);
  for (; output < last; output++) direct<T, BITS, ROWS, 1>(p, all, output);
}

// Some inputs of one output's weights, dequantized.
template <typename T, int BITS>
void dequantize(const Quantized& p, int64_t output, int64_t from, int64_t depth, float* out) {
  const int64_t groups = p.inputs / p.group, count = depth / p.group;
  float scales[SHALLOW / 32], biases[SHALLOW / 32];
  widen<T>(p.scales, output * groups + from / p.group, count, scales);
  widen<T>(p.biases, output * groups + from / p.group, count, biases);
  dequantize<BITS>(p.words + (output * p.inputs + from) / PER_WORD<BITS>, scales, biases, count, p.group, out);
}

// Many rows: weights are dequantized once for a block of rows.
template <typename T, int BITS>
void many(const Quantized& p, int64_t first, int64_t last) {
  many(p, first, last, 128, [&](int64_t output, int64_t count, Part& part, float* panel) {
    for (int64_t o = 0; o < count; o++)
      dequantize<T, BITS>(p, output + o, part.from, part.depth, panel + o * WIDE_STRIDE);
    part.step = p.inputs / PER_WORD<BITS> * 4, part.bytes = FETCHED / PER_WORD<BITS> * 4;
    const uint32_t* next = p.words + ((output + WIDE) * p.inputs + part.from) / PER_WORD<BITS>;
    part.ahead = output + 2 * WIDE <= last ? reinterpret_cast<const char*>(next) : nullptr;
    return Weights{panel, WIDE_STRIDE};
  });
}

template <typename T, int BITS>
void product(const Quantized& p, int64_t first, int64_t last) {
  if (p.rows == 1) few<T, BITS, 1>(p, first, last);
  else if (p.rows == 2) few<T, BITS, 2>(p, first, last);
  else if (p.rows == Quantized::FEW) few<T, BITS, 3>(p, first, last);
  else many<T, BITS>(p, first, last);
}

template <typename T>
void product(const Quantized& p, int64_t first, int64_t last) {
  if (p.bits == 4) product<T, 4>(p, first, last);
  else product<T, 8>(p, first, last);
}

template <int BITS>
void spread(const Spread& p, int64_t row) {
  const float* x = p.x + row * p.inputs;
  float* out = p.out + row * p.size();
  for (int64_t from = 0; from < p.sums(); from += LANES * PER_WORD<BITS>)
    for (int n = 0; n < PER_WORD<BITS>; n++)
      for (int lane = 0; lane < LANES; lane++) {
        const int64_t input = from + lane * PER_WORD<BITS> + n;
        out[from + n * LANES + lane] = input < p.inputs ? x[input] * in_place_scale<BITS>(n) : 0.0f;
      }
  for (int64_t group = 0; group < p.size() - p.sums(); group++) {
    Floats sum{};
    if (group < p.inputs / p.group)
      for (int i = 0; i < p.group; i += LANES) sum += load<Floats>(x + group * p.group + i);
    out[p.sums() + group] = total(sum);
  }
}

}  // namespace

extern "C" void NAME(quantized)(const Quantized& p, int64_t first, int64_t last) noexcept {
  by_blocks(p, first, last, [](const Quantized& own, int64_t begin, int64_t end) {
    if (own.type == 0) product<float>(own, begin, end);
    else if (own.type == 1) product<Float16>(own, begin, end);
    else product<BFloat16>(own, begin, end);
  });
}

extern "C" void NAME(spread)(const Spread& p, int64_t first, int64_t last) noexcept {
  for (int64_t row = first; row < last; row++)
    if (p.bits == 4) spread<4>(p, row);
    else spread<8>(p, row);
}
