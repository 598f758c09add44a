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
constexpr int TILE = LANES == 16 ? 24 : 12;   // outputs times vectors of rows in a tile
constexpr int WIDE = 2 * TILE;                // outputs that share its rows: whole tiles, and whole vectors of them
constexpr int64_t SHALLOW = 768;              // inputs of so many outputs, whose weights stay in a second-level cache
constexpr int64_t WIDE_STRIDE = SHALLOW + 16;  // between copies of their weights: caches collide at powers of two
constexpr int64_t FETCHED = 16;               // floats of a line of the caches

typedef float Quad __attribute__((vector_size(16)));

// Some inputs of a product, and what is fetched into a cache meanwhile: `step` bytes from `ahead` on, per vector of inputs
// in a block; in a tile, `bytes` per FETCHED inputs of each output, with `step` bytes between outputs, or nothing.
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

// VECTORS vectors of rows times OUTPUTS outputs, for some inputs, as [OUTPUTS, VECTORS * LANES]. x: from the first input
// on, with `apart` between vectors.
template <int VECTORS, int OUTPUTS>
__attribute__((noinline)) void tile(const float* x, int64_t apart, Weights weights, Part part, float* out) {
  Floats sums[OUTPUTS][VECTORS] = {};
  const auto add = [&](int64_t i) {
    Floats inputs[VECTORS];
    for (int v = 0; v < VECTORS; v++) inputs[v] = load<Floats>(x + v * apart + i * LANES);
    for (int o = 0; o < OUTPUTS; o++) {
      const Floats weight = splat(weights.data[o * weights.stride + i]);
      for (int v = 0; v < VECTORS; v++) sums[o][v] += weight * inputs[v];
    }
  };
  int64_t i = 0;
  if (part.ahead)
    for (int o = 0; o < OUTPUTS; o++) {
      const char* line = part.ahead + o * part.step;
      for (const int64_t end = part.depth * (o + 1) / OUTPUTS; i + 2 <= end; i += 2, line += part.bytes * OUTPUTS / 8) {
        __builtin_prefetch(line, 0, 2);
        add(i), add(i + 1);
      }
    }
  for (; i < part.depth; i++) add(i);
  __builtin_memcpy(out, sums, sizeof sums);
}

// Sums of a vector of rows, with `apart` between outputs, into the product.
inline void put(const Product& p, const float* sums, int64_t apart, int64_t row, int64_t output, int64_t count,
                bool adds) {
  const int64_t number = p.rows - row;
  for (int64_t o = 0; o < count; o += LANES, output += LANES) {
    const int64_t rest = count - o;
    Floats block[LANES];
#pragma GCC unroll 16
    for (int n = 0; n < LANES; n++) block[n] = load<Floats>(sums + (o + n) * apart);
    transpose(block);
    const Floats bias = p.bias ? load_some(p.bias + output, rest, 0.0f) : Floats{};
    float* out = p.out + row * p.outputs + output;
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++)
      if (r < number) {
        float* own = out + r * p.outputs;
        store_some(block[r] + (adds ? load_some(own, rest, 0.0f) : bias), rest, own);
      }
  }
}

// VECTORS vectors of rows times the outputs of a panel.
template <int VECTORS>
void tiles(const Product& p, Weights weights, int64_t vector, int64_t output, int64_t count, Part part) {
  constexpr int OUTPUTS = TILE / VECTORS, APART = VECTORS * LANES;
  alignas(64) float sums[WIDE * APART];
  const float* x = p.columns + (vector * p.inputs + part.from) * LANES;
  const int64_t apart = p.inputs * LANES;
  const auto at = [&](int64_t o) {
    Part own = part;
    if (part.ahead) own.ahead += o * part.step;
    return own;
  };
  const auto from = [&](int64_t o) { return Weights{weights.data + o * weights.stride, weights.stride}; };
  const int64_t number = least(VECTORS * LANES, p.rows - vector * LANES), share = number * OUTPUTS / count + 1;
  float* next = p.out + vector * LANES * p.outputs + output;  // of the rows that are fetched to put sums into
  float* const end = next + number * p.outputs;
  int64_t o = 0;
  for (; o + OUTPUTS <= count; o += OUTPUTS) {
    for (int64_t row = 0; row < share && next < end; row++, next += p.outputs)
      for (int64_t i = 0; i < count; i += FETCHED) __builtin_prefetch(next + i, 1, 2);
    tile<VECTORS, OUTPUTS>(x, apart, from(o), at(o), sums + o * APART);
  }
  if (o < count && count >= OUTPUTS) {  // the last ones again
    o = count - OUTPUTS;
    tile<VECTORS, OUTPUTS>(x, apart, from(o), at(o), sums + o * APART);
  } else
    for (; o < count; o++) tile<VECTORS, 1>(x, apart, from(o), at(o), sums + o * APART);
  for (int v = 0; v < VECTORS; v++)
    put(p, sums + v * LANES, APART, (vector + v) * LANES, output, count, part.from > 0);
}

// A block of rows in columns, and those that are left over. weights_of(output, count, part, panel) has the weights of
// some outputs, in `panel` if they are no float32, and sets what is fetched for the next ones, with the first vectors.
// unit: inputs in whose multiples they are.
template <typename WeightsOf>
void many(const Product& p, int64_t first, int64_t last, int64_t unit, const WeightsOf& weights_of) {
  alignas(64) float panel[WIDE * WIDE_STRIDE];
  const int64_t vectors = p.columns ? vectors_of(p.rows, LANES) : 0, wide = vectors ? WIDE : PANEL;
  const int64_t each = parts_of(parts_of(p.inputs, parts_of(p.inputs, SHALLOW)), unit) * unit;
  for (Part part{0, 0}; part.from < p.inputs; part.from += each) {
    part.depth = least(each, p.inputs - part.from);
    for (int64_t output = first; output < last; output += wide) {
      const int64_t count = least(wide, last - output);
      const Weights own = weights_of(output, count, part, panel);
      for (int64_t v = 0; v < vectors; part.ahead = nullptr) {
        const int64_t left = vectors - v, taken = left == 4 ? 2 : least(3, left);
        if (taken == 3) tiles<3>(p, own, v, output, count, part);
        else if (taken == 2) tiles<2>(p, own, v, output, count, part);
        else tiles<1>(p, own, v, output, count, part);
        v += taken;
      }
      for (int64_t row = vectors * LANES; row < p.rows; row += MOST)
        for (int64_t o = 0; o < count; o += PANEL)
          rows<float, MOST>(least(MOST, p.rows - row), p, own.data + o * own.stride, own.stride, row, output + o,
                            least(PANEL, count - o), {part.from, part.depth, reinterpret_cast<const char*>(own.data)});
    }
  }
}

// Have compute(block, first, last) compute the outputs of each block of rows that some items are of.
template <typename Task, typename Compute>
void by_blocks(const Task& p, int64_t first, int64_t last, const Compute& compute) {
  for (int64_t item = first, end; item < last; item = end) {
    const int64_t block = item / p.panels(), begin = block * p.panels(), row = block * p.block();
    end = least(last, begin + p.panels());
    Task own = p;
    own.take(row, least(p.block(), p.rows - row));
    compute(own, (item - begin) * p.OUTPUTS, least((end - begin) * p.OUTPUTS, p.outputs));
  }
}

}  // namespace
