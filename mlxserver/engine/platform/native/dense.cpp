// Kernel of a product with weights of 32 or 16 bits. Compiled once per instruction set: NAME is the function, LANES the
// floats of a vector.
//
// A vector has inputs of one row or one output, and several rows are multiplied with several outputs at once, so that
// most operands stay in registers. Weights are read where they are, once for all rows of a block; those of 16 bits are
// widened in registers, or for more rows into a buffer: as float32 they are the same numbers, so what differs from a
// product with widened weights is the order of the additions.
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 4;                      // outputs that are computed at once
constexpr int MOST = LANES == 16 ? 6 : 3;     // rows that are: as many as there are registers for
constexpr int64_t DEPTH = 1024;               // inputs of a panel that stay in a first-level cache
constexpr int64_t BLOCK = 64;                 // rows whose inputs stay in a second-level cache
constexpr int64_t STRIDE = DEPTH + 64;        // between a widened panel's outputs: no power of two, which caches collide at
constexpr int64_t LINE = 64;                  // bytes

// Some inputs of a product.
struct Part {
  int64_t from, depth;
};

// What `sums` of a panel are added to.
inline float base(const Dense& p, const float* out, int64_t output, int64_t from) {
  return from ? *out : p.bias ? p.bias[output] : 0.0f;
}

template <int OUTPUTS>
inline void add_up(const Floats* sums, float* out) {
#if LANES >= 8
  if constexpr (OUTPUTS == 4) {
    __m128 halves[4];
    for (int o = 0; o < 4; o++) {
#if LANES == 16
      const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums[o]), _mm512_extractf32x8_ps(sums[o], 1));
#else
      const __m256 half = sums[o];
#endif
      halves[o] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    const __m128 low = _mm_hadd_ps(halves[0], halves[1]), high = _mm_hadd_ps(halves[2], halves[3]);
    return _mm_storeu_ps(out, _mm_hadd_ps(low, high));
  }
#endif
  for (int o = 0; o < OUTPUTS; o++) out[o] = total(sums[o]);
}

// ROWS rows times OUTPUTS outputs, for some inputs. x and weights: of the first row and output, from part.from on.
template <typename T, int ROWS, int OUTPUTS>
inline void block(const Dense& p, const T* weights, int64_t stride, int64_t row, int64_t output, Part part) {
  const float* x = p.x + row * p.inputs + part.from;
  Floats sums[ROWS][OUTPUTS] = {};
  int64_t i = 0;
  for (; i + LANES <= part.depth; i += LANES) {
    Floats inputs[ROWS];
    for (int r = 0; r < ROWS; r++) inputs[r] = load<Floats>(x + r * p.inputs + i);
    for (int o = 0; o < OUTPUTS; o++) {
      const Floats weight = load_widened(weights + o * stride + i);
      for (int r = 0; r < ROWS; r++) sums[r][o] += weight * inputs[r];
    }
  }
  for (int r = 0; r < ROWS; r++) {
    float values[OUTPUTS], *out = p.out + (row + r) * p.outputs + output;
    add_up<OUTPUTS>(sums[r], values);
    for (int64_t rest = i; rest < part.depth; rest++)
      for (int o = 0; o < OUTPUTS; o++) values[o] += widened(weights[o * stride + rest]) * x[r * p.inputs + rest];
    for (int o = 0; o < OUTPUTS; o++) out[o] = base(p, out + o, output + o, part.from) + values[o];
  }
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

// Weights of the next panel, into the cache, while this one is multiplied with some of its rows.
template <typename T>
inline void fetch(const T* weights, int64_t stride, int64_t count, int64_t depth, int64_t share, int64_t shares) {
  const int64_t lines = (depth * int64_t(sizeof(T)) + LINE - 1) / LINE, all = lines * count;
  for (int64_t n = all * share / shares; n < all * (share + 1) / shares; n++)
    __builtin_prefetch(reinterpret_cast<const char*>(weights + n / lines * stride) + n % lines * LINE, 0, 2);
}

template <typename T>
void few(const Dense& p, int64_t first, int64_t last) {
  const T* weights = static_cast<const T*>(p.weight);
  for (int64_t output = first; output < last; output += PANEL)
    rows<T, MOST>(p.rows, p, weights + output * p.inputs, p.inputs, 0, output, least(PANEL, last - output), {0, p.inputs});
}

template <typename T>
void many(const Dense& p, int64_t first, int64_t last) {
  constexpr bool IS_WIDE = sizeof(T) == sizeof(float);
  alignas(64) float panel[IS_WIDE ? 1 : PANEL * STRIDE];
  const int64_t parts = (p.inputs + DEPTH - 1) / DEPTH, each = ((p.inputs + parts - 1) / parts + LANES - 1) / LANES * LANES;
  for (int64_t begin = 0; begin < p.rows; begin += BLOCK) {
    const int64_t end = least(begin + BLOCK, p.rows), groups = (end - begin + MOST - 1) / MOST;
    for (Part part{0, 0}; part.from < p.inputs; part.from += each) {
      part.depth = least(each, p.inputs - part.from);
      for (int64_t output = first; output < last; output += PANEL) {
        const int64_t count = least(PANEL, last - output), after = least(PANEL, last - output - count);
        const T* weights = static_cast<const T*>(p.weight) + output * p.inputs + part.from;
        if constexpr (!IS_WIDE)
          for (int64_t o = 0; o < count; o++) {
            const T* from = weights + o * p.inputs;
            float* to = panel + o * STRIDE;
            int64_t i = 0;
            for (; i + LANES <= part.depth; i += LANES) {
              const Floats wide = load_widened(from + i);
              __builtin_memcpy(to + i, &wide, sizeof wide);
            }
            for (; i < part.depth; i++) to[i] = widened(from[i]);
          }
        for (int64_t group = 0, row = begin; group < groups; group++) {
          const int64_t number = (end - row) / (groups - group);
          fetch(weights + PANEL * p.inputs, p.inputs, after, part.depth, group, groups);
          if constexpr (IS_WIDE) rows<float, MOST>(number, p, weights, p.inputs, row, output, count, part);
          else rows<float, MOST>(number, p, panel, STRIDE, row, output, count, part);
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

extern "C" void NAME(const Dense& p, int64_t first, int64_t last) noexcept {
  if (p.type == 0) product<float>(p, first, last);
  else if (p.type == 1) product<Float16>(p, first, last);
  else product<BFloat16>(p, first, last);
}
