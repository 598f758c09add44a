// Kernel of a product with weights of 32 or 16 bits. Compiled once per instruction set: LEVEL names it, LANES the
// floats of a vector.
//
// A vector has inputs of one row or one output, and several rows are multiplied with several outputs at once, so that
// most operands stay in registers. Weights are read once for all rows of a block, and the next ones are fetched meanwhile.
// Those of 16 bits are widened in registers, or for more rows into a buffer: as float32 they are the same numbers, so what
// differs from a product with widened weights is the order of the additions.
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 4;                      // outputs that are computed at once
constexpr int MOST = LANES == 16 ? 6 : 3;     // rows that are: as many as there are registers for
constexpr int64_t DEPTH = 1536;               // inputs of a panel, which stays in a first-level cache
constexpr int64_t HALF = DEPTH / 2;           // the same for many rows, whose inputs are to stay in the second-level one
constexpr int64_t MOST_GROUPS = 8;            // of rows, for which weights of 32 bits are read where they are
constexpr int64_t BLOCK = 64;                 // rows whose inputs stay in a second-level cache
constexpr int64_t STRIDE = DEPTH + 64;        // between a widened panel's outputs: no power of two, which caches collide at

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

// ROWS rows times OUTPUTS outputs, for some inputs. weights: from the first output and input on.
template <typename T, int ROWS, int OUTPUTS>
__attribute__((noinline)) void block(const Dense& p, const T* weights, int64_t stride, int64_t row, int64_t output, Part part) {
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
      for (int o = 0; o < OUTPUTS; o++) out[r * p.outputs + o] += widened(weights[o * stride + i]) * x[r * p.inputs + i];
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

// Some outputs' weights as float32, STRIDE between them.
template <typename T>
void widen(const T* weights, int64_t stride, int64_t count, int64_t depth, float* out) {
  for (int64_t o = 0; o < count; o++, weights += stride, out += STRIDE) {
    int64_t i = 0;
    for (; i + LANES <= depth; i += LANES) {
      const Floats wide = load_widened(weights + i);
      __builtin_memcpy(out + i, &wide, sizeof wide);
    }
    for (; i < depth; i++) out[i] = widened(weights[i]);
  }
}

template <typename T>
void many(const Dense& p, int64_t first, int64_t last) {
  alignas(64) float panel[PANEL * STRIDE];
  const int64_t most = p.rows > MOST_GROUPS * MOST ? HALF : DEPTH;
  const int64_t parts = (p.inputs + most - 1) / most, each = ((p.inputs + parts - 1) / parts + LANES - 1) / LANES * LANES;
  for (int64_t begin = 0; begin < p.rows; begin += BLOCK) {
    const int64_t end = least(begin + BLOCK, p.rows), groups = (end - begin + MOST - 1) / MOST;
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
        if constexpr (sizeof(T) == sizeof(float)) {
          if (groups <= MOST_GROUPS) wide = weights, stride = p.inputs;
        }
        if (wide == panel) widen(weights, p.inputs, count, part.depth, panel);
        part.ahead = reinterpret_cast<const char*>(weights + PANEL * p.inputs);
        for (int64_t group = 0, row = begin; group < groups; group++, part.ahead += share) {
          const int64_t number = (end - row) / (groups - group);
          rows<float, MOST>(number, p, wide, stride, row, output, count, part);
          row += number;
        }
      }
    }
  }
}

template <typename T>
void product(const Dense& p, int64_t first, int64_t last) {
  if (p.rows <= MOST) few<T>(p, first, last);
  else many<T>(p, first, last);
}

}  // namespace

extern "C" void NAME(dense)(const Dense& p, int64_t first, int64_t last) noexcept {
  if (p.type == 0) product<float>(p, first, last);
  else if (p.type == 1) product<Float16>(p, first, last);
  else product<BFloat16>(p, first, last);
}
