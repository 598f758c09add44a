// Kernel of a product with quantized weights. Compiled once per instruction set: LEVEL names it, LANES the floats
// of a vector. Vectors are those of GCC and Clang, so one text has NEON, SSE2, AVX2 and AVX-512.
//
// A weight is dequantized as MLX does it, scale * quantized + bias in float32: what differs from a product with
// dequantized weights is the order of the additions.
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 4;                     // outputs that few rows are multiplied with at once
constexpr int TILE = 2 * LANES;              // outputs that many rows are multiplied with at once
constexpr int64_t DEPTH = 256;               // inputs of a tile that are dequantized at once, for a first-level cache
constexpr int64_t SPAN = 64;                 // groups of a panel whose scales are widened at once
constexpr int64_t BLOCK = 192;               // rows whose inputs stay in a second-level cache
constexpr int64_t MOST_DIRECT = 3, MOST_ROWS = 6;

template <typename T>
void widen(const void* values, int64_t begin, int64_t count, float* out) {
  const T* from = static_cast<const T*>(values) + begin;
  for (int64_t i = 0; i < count; i++) out[i] = widened(from[i]);
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

// LANES outputs from `output` on as columns, dequantized: out[input - from][LANES] with TILE floats between inputs.
// What is beyond the last output repeats it.
template <int BITS>
void dequantize(const Quantized& p, int64_t output, int64_t last, int64_t from, int64_t to, float* out) {
  constexpr int64_t GROUPS = DEPTH / 32;
  const int64_t groups = p.inputs / p.group, stride = p.inputs / PER_WORD<BITS>, first = from / p.group;
  const int64_t count = (to - from) / p.group;
  const uint32_t* rows[LANES];
  float scales[LANES][GROUPS], biases[LANES][GROUPS];
  for (int lane = 0; lane < LANES; lane++) {
    const int64_t o = least(output + lane, last - 1);
    rows[lane] = p.words + o * stride;
    widen(p.scales, p.type, o * groups + first, count, scales[lane]);
    widen(p.biases, p.type, o * groups + first, count, biases[lane]);
  }
  for (int64_t g = 0; g < count; g++) {
    Floats scale, bias;
    for (int lane = 0; lane < LANES; lane++) scale[lane] = scales[lane][g], bias[lane] = biases[lane][g];
    for (int64_t i = from + g * p.group; i < from + (g + 1) * p.group; i += PER_WORD<BITS>) {
      Words words;
      for (int lane = 0; lane < LANES; lane++) words[lane] = rows[lane][i / PER_WORD<BITS>];
      for (int n = 0; n < PER_WORD<BITS>; n++) {
        Words values = (words >> (BITS * n)) & ((1u << BITS) - 1);
        Floats weight = __builtin_convertvector(reinterpret_cast<Ints>(values), Floats) * scale + bias;
        __builtin_memcpy(out + (i - from + n) * TILE, &weight, sizeof weight);
      }
    }
  }
}

// Some rows times a dequantized tile, of which `outputs` are wanted.
template <int ROWS>
void tile(const Quantized& p, int64_t row, int64_t output, int64_t outputs, int64_t from, int64_t depth,
          const float* weights) {
  const float* x = p.x + row * p.inputs + from;
  Floats sums[ROWS][2] = {};
  for (int64_t i = 0; i < depth; i++) {
    const Floats one = load<Floats>(weights + i * TILE), two = load<Floats>(weights + i * TILE + LANES);
    for (int r = 0; r < ROWS; r++) {
      const Floats input = splat(x[r * p.inputs + i]);
      sums[r][0] += one * input;
      sums[r][1] += two * input;
    }
  }
  for (int r = 0; r < ROWS; r++) {
    float* out = p.out + (row + r) * p.outputs + output;
    float values[TILE];
    __builtin_memcpy(values, sums[r], sizeof values);
    if (outputs == TILE)
      for (int o = 0; o < TILE; o++) out[o] = from ? out[o] + values[o] : values[o];
    else
      for (int64_t o = 0; o < outputs; o++) out[o] = from ? out[o] + values[o] : values[o];
  }
}

template <int ROWS>
void tiles(int64_t rows, const Quantized& p, int64_t row, int64_t output, int64_t outputs, int64_t from, int64_t depth,
           const float* weights) {
  if (rows == ROWS) return tile<ROWS>(p, row, output, outputs, from, depth, weights);
  if constexpr (ROWS > 1) tiles<ROWS - 1>(rows, p, row, output, outputs, from, depth, weights);
}

// Many rows: a vector has one input of several outputs, and a dequantized tile serves a block of rows.
template <int BITS>
void many(const Quantized& p, int64_t first, int64_t last) {
  alignas(64) float weights[DEPTH * TILE];
  for (int64_t begin = 0; begin < p.rows; begin += BLOCK) {
    const int64_t end = least(begin + BLOCK, p.rows), parts = (end - begin + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t output = first; output < last; output += TILE)
      for (int64_t from = 0; from < p.inputs; from += DEPTH) {
        const int64_t to = least(from + DEPTH, p.inputs);
        for (int half = 0; half < 2; half++)
          dequantize<BITS>(p, output + half * LANES, last, from, to, weights + half * LANES);
        for (int64_t part = 0, row = begin; part < parts; part++) {
          const int64_t rows = (end - row) / (parts - part);
          tiles<MOST_ROWS>(rows, p, row, output, least(TILE, last - output), from, to - from, weights);
          row += rows;
        }
      }
  }
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
