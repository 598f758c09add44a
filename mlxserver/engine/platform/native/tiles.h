// Blocks of a product with weights in float32, or widened to it: several rows are multiplied with several outputs at once,
// so that most operands stay in registers.
//
// Rule: everything here is in an unnamed namespace (vectors.h).
#pragma once
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 4;                      // outputs that are computed at once with rows that are no columns
constexpr int MOST = LANES == 16 ? 6 : 3;     // rows that are: as many as there are registers for
constexpr int WIDE = LANES == 16 ? 24 : 12;   // outputs times vectors of rows in a tile, and outputs that share its rows
constexpr int64_t SHALLOW = 768;              // inputs of so many outputs, whose weights stay in a first-level cache
constexpr int64_t WIDE_STRIDE = SHALLOW + 16;  // between copies of their weights: caches collide at powers of two
constexpr int64_t TOGETHER = 96 / LANES;      // vectors of rows whose inputs stay in a second-level cache
constexpr int64_t FETCHED = 16;               // inputs of an output that are fetched at once

typedef float Quad __attribute__((vector_size(16)));

// Some inputs of a product, and what is fetched into the cache meanwhile: `step` bytes from `ahead` on, per vector of
// inputs in a block; in a tile, `bytes` per FETCHED inputs of each output, with `step` bytes between outputs.
struct Part {
  int64_t from, depth;
  const char* ahead = nullptr;
  int64_t step = 0, bytes = 0;
};

// Weights of some outputs as float32, with `stride` between outputs.
struct Weights {
  const float* data;
  int64_t stride;
};

// The sums of four vectors each.
inline Quad totals(const Floats* sums) {
#if LANES >= 8
  __m128 halves[4];
  for (int o = 0; o < 4; o++) {
#if LANES == 16
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums[o]), _mm512_extractf32x8_ps(sums[o], 1));
#else
    const __m256 half = sums[o];
#endif
    halves[o] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  return _mm_hadd_ps(_mm_hadd_ps(halves[0], halves[1]), _mm_hadd_ps(halves[2], halves[3]));
#else
  return Quad{total(sums[0]), total(sums[1]), total(sums[2]), total(sums[3])};
#endif
}

// ROWS rows times OUTPUTS outputs, for some inputs. weights: from the first output and input on.
template <typename T, int ROWS, int OUTPUTS>
__attribute__((noinline)) void block(const Product& p, const T* weights, int64_t stride, int64_t row, int64_t output,
                                     Part part) {
  const float* x = p.x + row * p.inputs + part.from;
  float* out = p.out + row * p.outputs + output;
  Floats sums[ROWS][OUTPUTS] = {};
  int64_t i = 0;
  const char* ahead = part.ahead;
  for (; i + LANES <= part.depth; i += LANES, ahead += part.step) {
    __builtin_prefetch(ahead, 0, 2);
    Floats inputs[ROWS];
    for (int r = 0; r < ROWS; r++) inputs[r] = load<Floats>(x + r * p.inputs + i);
    for (int o = 0; o < OUTPUTS; o++) {
      const Floats weight = load_widened(weights + o * stride + i);
      for (int r = 0; r < ROWS; r++) sums[r][o] += weight * inputs[r];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    float* own = out + r * p.outputs;
    if constexpr (OUTPUTS == 4) {
      const Quad base = part.from ? load<Quad>(own) : p.bias ? load<Quad>(p.bias + output) : Quad{};
      const Quad all = base + totals(sums[r]);
      __builtin_memcpy(own, &all, sizeof all);
    } else {
      for (int o = 0; o < OUTPUTS; o++)
        own[o] = (part.from ? own[o] : p.bias ? p.bias[output + o] : 0.0f) + total(sums[r][o]);
    }
  }
  for (; i < part.depth; i++)
    for (int r = 0; r < ROWS; r++)
      for (int o = 0; o < OUTPUTS; o++)
        out[r * p.outputs + o] += widened(weights[o * stride + i]) * x[r * p.inputs + i];
}

template <typename T, int ROWS>
inline void outputs(const Product& p, const T* weights, int64_t stride, int64_t row, int64_t output, int64_t count,
                    Part part) {
  if (count == PANEL) return block<T, ROWS, PANEL>(p, weights, stride, row, output, part);
  for (int64_t o = 0; o < count; o++) block<T, ROWS, 1>(p, weights + o * stride, stride, row, output + o, part);
}

template <typename T, int ROWS>
inline void rows(int64_t number, const Product& p, const T* weights, int64_t stride, int64_t row, int64_t output,
                 int64_t count, Part part) {
  if (number == ROWS) return outputs<T, ROWS>(p, weights, stride, row, output, count, part);
  if constexpr (ROWS > 1) rows<T, ROWS - 1>(number, p, weights, stride, row, output, count, part);
}

// VECTORS vectors of rows times OUTPUTS outputs, for some inputs.
template <int VECTORS, int OUTPUTS>
__attribute__((noinline)) void tile(const Product& p, const float* weights, int64_t stride, int64_t vector,
                                    int64_t output, Part part) {
  const float* x = p.columns + (vector * p.inputs + part.from) * LANES;
  const int64_t apart = p.inputs * LANES;
  Floats sums[OUTPUTS][VECTORS] = {};
  const auto add = [&](int64_t i) {
    Floats inputs[VECTORS];
    for (int v = 0; v < VECTORS; v++) inputs[v] = load<Floats>(x + v * apart + i * LANES);
    for (int o = 0; o < OUTPUTS; o++) {
      const Floats weight = splat(weights[o * stride + i]);
      for (int v = 0; v < VECTORS; v++) sums[o][v] += weight * inputs[v];
    }
  };
  int64_t i = 0;
  for (; i + FETCHED <= part.depth; i += FETCHED) {
    for (int o = 0; o < OUTPUTS; o++)
      __builtin_prefetch(part.ahead + o * part.step + i / FETCHED * part.bytes, 0, 2);
#pragma GCC unroll 4
    for (int64_t n = 0; n < FETCHED; n++) add(i + n);
  }
  for (; i < part.depth; i++) add(i);
  float values[OUTPUTS][VECTORS * LANES];
  __builtin_memcpy(values, sums, sizeof values);
  const int64_t row = vector * LANES, count = least(VECTORS * LANES, p.rows - row);
  float* out = p.out + row * p.outputs + output;
  for (int64_t r = 0; r < count; r++, out += p.outputs)
    for (int o = 0; o < OUTPUTS; o++)
      out[o] = (part.from ? out[o] : p.bias ? p.bias[output + o] : 0.0f) + values[o][r];
}

template <int VECTORS>
void tiles(const Product& p, const float* weights, int64_t stride, int64_t vector, int64_t output, int64_t count,
           Part part) {
  constexpr int OUTPUTS = WIDE / VECTORS;
  int64_t o = 0;
  for (; o + OUTPUTS <= count; o += OUTPUTS, weights += OUTPUTS * stride, part.ahead += OUTPUTS * part.step)
    tile<VECTORS, OUTPUTS>(p, weights, stride, vector, output + o, part);
  for (; o < count; o++, weights += stride, part.ahead += part.step)
    tile<VECTORS, 1>(p, weights, stride, vector, output + o, part);
}

// Rows in columns, and those that are left over. weights_of(output, count, part, panel) has the weights of some outputs,
// in `panel` if they are no float32, and sets what is fetched for the next ones. unit: inputs in whose multiples they are.
template <typename WeightsOf>
void many(const Product& p, int64_t first, int64_t last, int64_t unit, const WeightsOf& weights_of) {
  alignas(64) float panel[WIDE * WIDE_STRIDE];
  const int64_t vectors = p.columns ? vectors_of(p.rows, LANES) : 0, parts = (p.inputs + SHALLOW - 1) / SHALLOW;
  const int64_t each = ((p.inputs + parts - 1) / parts + unit - 1) / unit * unit;
  for (int64_t begin = 0; begin == 0 || begin < vectors; begin += TOGETHER) {
    const int64_t end = least(begin + TOGETHER, vectors);
    for (Part part{0, 0}; part.from < p.inputs; part.from += each) {
      part.depth = least(each, p.inputs - part.from);
      for (int64_t output = first; output < last; output += WIDE) {
        const int64_t count = least(WIDE, last - output);
        const Weights own = weights_of(output, count, part, panel);
        for (int64_t v = begin; v < end;) {
          const int64_t left = end - v, taken = left == 4 ? 2 : least(3, left);
          if (taken == 3) tiles<3>(p, own.data, own.stride, v, output, count, part);
          else if (taken == 2) tiles<2>(p, own.data, own.stride, v, output, count, part);
          else tiles<1>(p, own.data, own.stride, v, output, count, part);
          v += taken;
        }
        if (end < vectors) continue;
        for (int64_t row = vectors * LANES; row < p.rows; row += MOST)
          for (int64_t o = 0; o < count; o += PANEL)
            rows<float, MOST>(least(MOST, p.rows - row), p, own.data + o * own.stride, own.stride, row, output + o,
                              least(PANEL, count - o), {part.from, part.depth, part.ahead, 0});
      }
    }
  }
}

}  // namespace
