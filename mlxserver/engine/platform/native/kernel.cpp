// Kernel of a product with quantized weights. Compiled once per instruction set: NAME is the function, LANES the floats
// of a vector. Vectors are those of GCC and Clang, so one text has NEON, SSE2, AVX2 and AVX-512.
//
// A weight is dequantized as MLX does it, scale * quantized + bias in float32, and each product is added to one of LANES
// sums: what differs from a product with dequantized weights is the order of the additions.
// Rule: no header with inline functions: the linker keeps one copy, which may be the one for another instruction set.
#include "kernel.h"

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <typename V>
inline V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline Floats splat(float value) { return Floats{} + value; }

inline float total(Floats v) {
  float sum[LANES];
  __builtin_memcpy(sum, &v, sizeof v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  return sum[0];
}

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Scales or biases as float32. A float16's exponent is moved by a product, which is exact for subnormal ones, too.
void widen(const void* values, int type, int64_t begin, int64_t count, float* out) {
  if (type == 0) {
    const float* from = static_cast<const float*>(values) + begin;
    for (int64_t i = 0; i < count; i++) out[i] = from[i];
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(values) + begin;
  if (type == 2) {
    for (int64_t i = 0; i < count; i++) out[i] = as_float(uint32_t(from[i]) << 16);
    return;
  }
  const float power = as_float((127u + 112u) << 23);
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = from[i];
    out[i] = as_float((bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13);
    out[i] *= power;
  }
}

// LANES quantized weights from index i on.
template <int BITS>
inline Floats quantized(const uint32_t* row, int64_t i) {
  if constexpr (BITS == 8) {
    Bytes bytes = load<Bytes>(reinterpret_cast<const uint8_t*>(row) + i);
    return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
  } else {
    Words words, shifts;
    for (int lane = 0; lane < LANES; lane++) shifts[lane] = 4 * (lane % 8 + i % 8 * (LANES < 8));
    if constexpr (LANES <= 8) {
      words = Words{} + row[i / 8];
    } else {
      Words upper;
      for (int lane = 0; lane < LANES; lane++) upper[lane] = lane < 8 ? 0u : ~0u;
      words = (~upper & row[i / 8]) | (upper & row[i / 8 + 1]);
    }
    return __builtin_convertvector(reinterpret_cast<Ints>((words >> shifts) & 15u), Floats);
  }
}

// Few rows: weights are dequantized in registers, by every ROWS rows anew.
template <int BITS, int ROWS, int OUTPUTS>
void direct(const Product& p, int64_t row, int64_t output, const float* scales, const float* biases) {
  const int64_t groups = p.inputs / p.group, words = p.inputs * BITS / 32;
  const float* x = p.x + row * p.inputs;
  const uint32_t* weights = p.words + output * words;
  Floats sums[OUTPUTS][ROWS] = {};
  for (int64_t g = 0; g < groups; g++) {
    Floats scale[OUTPUTS], bias[OUTPUTS];
    for (int o = 0; o < OUTPUTS; o++) scale[o] = splat(scales[o * groups + g]), bias[o] = splat(biases[o * groups + g]);
    for (int64_t i = g * p.group; i < (g + 1) * p.group; i += LANES) {
      Floats inputs[ROWS];
      for (int r = 0; r < ROWS; r++) inputs[r] = load<Floats>(x + r * p.inputs + i);
      for (int o = 0; o < OUTPUTS; o++) {
        Floats weight = quantized<BITS>(weights + o * words, i) * scale[o] + bias[o];
        for (int r = 0; r < ROWS; r++) sums[o][r] += weight * inputs[r];
      }
    }
  }
  for (int o = 0; o < OUTPUTS; o++)
    for (int r = 0; r < ROWS; r++) p.out[(row + r) * p.outputs + output + o] = total(sums[o][r]);
}

template <int BITS>
void dequantize(const Product& p, int64_t output, int64_t from, int64_t to, const float* scale, const float* bias,
                float* out) {
  const uint32_t* row = p.words + output * (p.inputs * BITS / 32);
  for (int64_t begin = from; begin < to; begin += p.group) {
    const Floats s = splat(scale[begin / p.group]), b = splat(bias[begin / p.group]);
    for (int64_t i = begin; i < begin + p.group; i += LANES) {
      Floats weight = quantized<BITS>(row, i) * s + b;
      __builtin_memcpy(out + i - from, &weight, sizeof weight);
    }
  }
}

// Some rows times a dequantized panel.
template <int ROWS, int OUTPUTS>
void tile(const Product& p, int64_t row, int64_t output, int64_t from, int64_t depth, const float* panel) {
  const float* x = p.x + row * p.inputs + from;
  Floats sums[OUTPUTS][ROWS] = {};
  for (int64_t i = 0; i < depth; i += LANES) {
    Floats inputs[ROWS];
    for (int r = 0; r < ROWS; r++) inputs[r] = load<Floats>(x + r * p.inputs + i);
    for (int o = 0; o < OUTPUTS; o++) {
      Floats weight = load<Floats>(panel + o * DEPTH + i);
      for (int r = 0; r < ROWS; r++) sums[o][r] += weight * inputs[r];
    }
  }
  for (int o = 0; o < OUTPUTS; o++)
    for (int r = 0; r < ROWS; r++) {
      float& out = p.out[(row + r) * p.outputs + output + o];
      out = from ? out + total(sums[o][r]) : total(sums[o][r]);
    }
}

template <int BITS, int OUTPUTS>
void panel(const Product& p, int64_t row, int64_t rows, int64_t output, const float* scales, const float* biases,
           float* weights) {
  const int64_t groups = p.inputs / p.group;
  if (rows <= 3) {
    if (rows == 1) direct<BITS, 1, OUTPUTS>(p, row, output, scales, biases);
    if (rows == 2) direct<BITS, 2, OUTPUTS>(p, row, output, scales, biases);
    if (rows == 3) direct<BITS, 3, OUTPUTS>(p, row, output, scales, biases);
    return;
  }
  for (int64_t from = 0; from < p.inputs; from += DEPTH) {
    const int64_t to = from + DEPTH < p.inputs ? from + DEPTH : p.inputs, depth = to - from;
    for (int o = 0; o < OUTPUTS; o++)
      dequantize<BITS>(p, output + o, from, to, scales + o * groups, biases + o * groups, weights + o * DEPTH);
    int64_t r = row;
    for (; r + 3 <= row + rows; r += 3) tile<3, OUTPUTS>(p, r, output, from, depth, weights);
    if (row + rows - r == 2) tile<2, OUTPUTS>(p, r, output, from, depth, weights);
    if (row + rows - r == 1) tile<1, OUTPUTS>(p, r, output, from, depth, weights);
  }
}

template <int BITS>
void outputs(const Product& p, int64_t first, int64_t last, float* scratch) {
  const int64_t groups = p.inputs / p.group;
  constexpr int64_t BLOCK = 48;  // rows whose inputs stay in a second-level cache
  float *weights = scratch, *scales = scratch + PANEL * DEPTH, *biases = scales + PANEL * groups;
  for (int64_t row = 0; row < p.rows; row += BLOCK) {
    const int64_t rows = row + BLOCK < p.rows ? BLOCK : p.rows - row;
    for (int64_t output = first; output < last;) {
      const int64_t count = last - output < PANEL ? 1 : PANEL;
      widen(p.scales, p.type, output * groups, count * groups, scales);
      widen(p.biases, p.type, output * groups, count * groups, biases);
      if (count == PANEL) panel<BITS, PANEL>(p, row, rows, output, scales, biases, weights);
      else panel<BITS, 1>(p, row, rows, output, scales, biases, weights);
      output += count;
    }
  }
}

}  // namespace

extern "C" void NAME(const Product& p, int64_t first, int64_t last, float* scratch) {
  if (p.bits == 4) outputs<4>(p, first, last, scratch);
  else outputs<8>(p, first, last, scratch);
}
