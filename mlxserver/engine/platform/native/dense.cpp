// Kernel of a product with weights of 32 or 16 bits. Compiled once per instruction set: LEVEL names it, LANES the
// floats of a vector.
//
// Several rows are multiplied with several outputs at once, so that most operands stay in registers. For few rows a
// vector has inputs of one row or one output. For many it has one input of several rows, which lie so in the columns that
// were made of them, and a weight is in all lanes: nothing is added up across a vector. Weights are read once for all
// rows of a block, while the next ones are fetched. Those of 16 bits are widened in registers, or for more rows into a
// buffer: as float32 they are the same numbers, so what differs from a product with widened weights is the order of the
// additions.
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 4;                      // outputs that are computed at once
constexpr int MOST = LANES == 16 ? 6 : 3;     // rows that are: as many as there are registers for
constexpr int64_t DEPTH = 1536;               // inputs of a panel, which stays in a first-level cache
constexpr int64_t STRIDE = DEPTH + 64;        // between a widened panel's outputs: caches collide at powers of two
constexpr int WIDE = LANES == 16 ? 24 : 12;   // outputs times vectors of rows in a tile, and outputs that share its rows
constexpr int64_t SHALLOW = 768;              // inputs of so many outputs
constexpr int64_t TOGETHER = 96 / LANES;      // vectors of rows whose inputs stay in a second-level cache

typedef float Quad __attribute__((vector_size(16)));

// Some inputs of a product, and what is fetched into the cache meanwhile: `step` bytes from `ahead` on per vector.
struct Part {
  int64_t from, depth;
  const char* ahead = nullptr;
  int64_t step = 0;
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

#if LANES == 8
// Eight inputs of eight rows, as eight columns.
inline void turn(const float* const* rows, int64_t from, float* out) {
  __m256 own[8], pairs[8], fours[8];
  for (int r = 0; r < 8; r++) own[r] = _mm256_loadu_ps(rows[r] + from);
  for (int r = 0; r < 8; r += 2) {
    pairs[r] = _mm256_unpacklo_ps(own[r], own[r + 1]);
    pairs[r + 1] = _mm256_unpackhi_ps(own[r], own[r + 1]);
  }
  for (int r = 0; r < 8; r += 4)
    for (int n = 0; n < 2; n++) {
      fours[r + 2 * n] = _mm256_shuffle_ps(pairs[r + n], pairs[r + n + 2], 0x44);
      fours[r + 2 * n + 1] = _mm256_shuffle_ps(pairs[r + n], pairs[r + n + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * 8, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * 8, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}
#endif

// ROWS rows times OUTPUTS outputs, for some inputs. weights: from the first output and input on.
template <typename T, int ROWS, int OUTPUTS>
__attribute__((noinline)) void block(const Dense& p, const T* weights, int64_t stride, int64_t row, int64_t output,
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
inline void outputs(const Dense& p, const T* weights, int64_t stride, int64_t row, int64_t output, int64_t count,
                    Part part) {
  if (count == PANEL) return block<T, ROWS, PANEL>(p, weights, stride, row, output, part);
  for (int64_t o = 0; o < count; o++) block<T, ROWS, 1>(p, weights + o * stride, stride, row, output + o, part);
}

template <typename T, int ROWS>
inline void rows(int64_t number, const Dense& p, const T* weights, int64_t stride, int64_t row, int64_t output,
                 int64_t count, Part part) {
  if (number == ROWS) return outputs<T, ROWS>(p, weights, stride, row, output, count, part);
  if constexpr (ROWS > 1) rows<T, ROWS - 1>(number, p, weights, stride, row, output, count, part);
}

template <typename T>
void few(const Dense& p, int64_t first, int64_t last) {
  const T* weights = static_cast<const T*>(p.weight) + first * p.inputs;
  for (int64_t output = first; output < last; output += PANEL, weights += PANEL * p.inputs) {
    const char* ahead = reinterpret_cast<const char*>(weights + PANEL * p.inputs);
    rows<T, MOST>(p.rows, p, weights, p.inputs, 0, output, least(PANEL, last - output),
                  {0, p.inputs, ahead, PANEL * LANES * int64_t(sizeof(T))});
  }
}

// Some outputs' weights as float32, `apart` between them.
template <typename T>
void widen(const T* weights, int64_t stride, int64_t count, int64_t depth, float* out, int64_t apart) {
  for (int64_t o = 0; o < count; o++, weights += stride, out += apart) {
    int64_t i = 0;
    for (; i + LANES <= depth; i += LANES) {
      const Floats wide = load_widened(weights + i);
      __builtin_memcpy(out + i, &wide, sizeof wide);
    }
    for (; i < depth; i++) out[i] = widened(weights[i]);
  }
}

// More rows than `few` takes, and too few for columns.
template <typename T>
void some(const Dense& p, int64_t first, int64_t last) {
  alignas(64) float panel[PANEL * STRIDE];
  const int64_t parts = (p.inputs + DEPTH - 1) / DEPTH, even = (p.inputs + parts - 1) / parts;
  const int64_t each = (even + LANES - 1) / LANES * LANES, groups = (p.rows + MOST - 1) / MOST;
  for (Part part{0, 0}; part.from < p.inputs; part.from += each) {
    part.depth = least(each, p.inputs - part.from);
    const T* weights = static_cast<const T*>(p.weight) + first * p.inputs + part.from;
    // A share of the next panel per group of rows.
    const int64_t share = PANEL * p.inputs * int64_t(sizeof(T)) / groups;
    part.step = share / (part.depth / LANES + 1);
    for (int64_t output = first; output < last; output += PANEL, weights += PANEL * p.inputs) {
      const int64_t count = least(PANEL, last - output);
      const float* wide = panel;
      int64_t stride = STRIDE;
      if constexpr (sizeof(T) == sizeof(float)) wide = weights, stride = p.inputs;
      else widen(weights, p.inputs, count, part.depth, panel, stride);
      part.ahead = reinterpret_cast<const char*>(weights + PANEL * p.inputs);
      for (int64_t group = 0, row = 0; group < groups; group++, part.ahead += share) {
        const int64_t number = (p.rows - row) / (groups - group);
        rows<float, MOST>(number, p, wide, stride, row, output, count, part);
        row += number;
      }
    }
  }
}

// VECTORS vectors of rows times OUTPUTS outputs, for some inputs. part.ahead: the weights that are needed later, with
// part.step bytes between outputs.
template <typename T, int VECTORS, int OUTPUTS>
__attribute__((noinline)) void tile(const Dense& p, const float* weights, int64_t stride, int64_t vector,
                                    int64_t output, Part part) {
  constexpr int64_t FETCHED = 16;  // inputs between two fetches: a line of a cache, or half of one
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
      __builtin_prefetch(part.ahead + o * part.step + i * int64_t(sizeof(T)), 0, 2);
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

template <typename T, int VECTORS>
void tiles(const Dense& p, const float* weights, int64_t stride, int64_t vector, int64_t output, int64_t count,
           Part part) {
  constexpr int OUTPUTS = WIDE / VECTORS;
  int64_t o = 0;
  for (; o + OUTPUTS <= count; o += OUTPUTS, weights += OUTPUTS * stride, part.ahead += OUTPUTS * part.step)
    tile<T, VECTORS, OUTPUTS>(p, weights, stride, vector, output + o, part);
  for (; o < count; o++, weights += stride, part.ahead += part.step)
    tile<T, VECTORS, 1>(p, weights, stride, vector, output + o, part);
}

// Rows in columns, and those that are left over.
template <typename T>
void many(const Dense& p, int64_t first, int64_t last) {
  alignas(64) float panel[WIDE * (SHALLOW + 16)];
  const int64_t vectors = vectors_of(p.rows, LANES), parts = (p.inputs + SHALLOW - 1) / SHALLOW;
  const int64_t each = ((p.inputs + parts - 1) / parts + LANES - 1) / LANES * LANES;
  const bool is_copied = sizeof(T) != sizeof(float) || p.inputs % 1024 == 0;  // caches collide at powers of two
  for (int64_t begin = 0; begin < vectors; begin += TOGETHER) {
    const int64_t end = least(begin + TOGETHER, vectors);
    for (Part part{0, 0}; part.from < p.inputs; part.from += each) {
      part.depth = least(each, p.inputs - part.from);
      part.step = p.inputs * int64_t(sizeof(T));
      const T* weights = static_cast<const T*>(p.weight) + first * p.inputs + part.from;
      for (int64_t output = first; output < last; output += WIDE, weights += WIDE * p.inputs) {
        const int64_t count = least(WIDE, last - output);
        const float* wide = panel;
        int64_t stride = SHALLOW + 16;
        if (is_copied) widen(weights, p.inputs, count, part.depth, panel, stride);
        else if constexpr (sizeof(T) == sizeof(float)) wide = weights, stride = p.inputs;
        part.ahead = reinterpret_cast<const char*>(weights + WIDE * p.inputs);
        for (int64_t v = begin; v < end;) {
          const int64_t left = end - v, taken = left == 4 ? 2 : least(3, left);
          if (taken == 3) tiles<T, 3>(p, wide, stride, v, output, count, part);
          else if (taken == 2) tiles<T, 2>(p, wide, stride, v, output, count, part);
          else tiles<T, 1>(p, wide, stride, v, output, count, part);
          v += taken;
        }
        if (end < vectors) continue;
        for (int64_t row = vectors * LANES; row < p.rows; row += MOST)
          for (int64_t o = 0; o < count; o += PANEL)
            rows<float, MOST>(least(MOST, p.rows - row), p, wide + o * stride, stride, row, output + o,
                              least(PANEL, count - o), {part.from, part.depth, part.ahead, 0});
      }
    }
  }
}

template <typename T>
void product(const Dense& p, int64_t first, int64_t last) {
  if (p.rows <= MOST) few<T>(p, first, last);
  else if (p.columns) many<T>(p, first, last);
  else some<T>(p, first, last);
}

}  // namespace

extern "C" void NAME(dense)(const Dense& p, int64_t first, int64_t last) noexcept {
  if (p.type == 0) product<float>(p, first, last);
  else if (p.type == 1) product<Float16>(p, first, last);
  else product<BFloat16>(p, first, last);
}

// The inputs of some vectors of rows as columns, [inputs, LANES] each. What is beyond the last row repeats it.
extern "C" void NAME(columns)(const Columns& p, int64_t first, int64_t last) noexcept {
  for (int64_t v = first; v < last; v++) {
    const float* rows[LANES];
    for (int64_t r = 0; r < LANES; r++) rows[r] = p.x + least(v * LANES + r, p.rows - 1) * p.inputs;
    float* out = p.out + v * LANES * p.inputs;
    int64_t i = 0;
#if LANES == 8
    for (; i + 8 <= p.inputs; i += 8) turn(rows, i, out + i * 8);
#endif
    for (; i < p.inputs; i++)
      for (int64_t r = 0; r < LANES; r++) out[i * LANES + r] = rows[r][i];
  }
}
