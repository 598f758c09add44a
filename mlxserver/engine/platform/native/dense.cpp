// Kernel of a product with weights of 32 or 16 bits. Compiled once per instruction set: LEVEL names it, LANES the
// floats of a vector.
//
// For few rows a vector has inputs of one row or one output. For many it has one input of several rows, which lie so in
// the columns that were made of them, and a weight is in all lanes: nothing is added up across a vector. Weights are
// read once for all rows of a block, while the next ones are fetched. Those of 16 bits are widened in registers, or for
// more rows into a buffer: as float32 they are the same numbers, so what differs from a product with widened weights is
// the order of the additions.
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "tiles.h"

namespace {

constexpr int64_t DEPTH = 1536;         // inputs of a panel, which stays in a first-level cache
constexpr int64_t STRIDE = DEPTH + 64;  // between a widened panel's outputs: caches collide at powers of two

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

// Rows in columns, and those that are left over.
template <typename T>
void many(const Dense& p, int64_t first, int64_t last) {
  many(p, first, last, LANES, [&](int64_t output, int64_t count, Part& part, float* panel) {
    const T* weights = static_cast<const T*>(p.weight) + output * p.inputs + part.from;
    part.step = p.inputs * int64_t(sizeof(T)), part.bytes = FETCHED * int64_t(sizeof(T));
    part.ahead = output + 2 * WIDE <= last ? reinterpret_cast<const char*>(weights) + WIDE * part.step : nullptr;
    if constexpr (sizeof(T) == sizeof(float)) return Weights{weights, p.inputs};
    widen(weights, p.inputs, count, part.depth, panel, WIDE_STRIDE);
    return Weights{panel, WIDE_STRIDE};
  });
}

template <typename T>
void product(const Dense& p, int64_t first, int64_t last) {
  if (p.rows <= MOST) few<T>(p, first, last);
  else if (p.columns) many<T>(p, first, last);
  else some<T>(p, first, last);
}

}  // namespace

extern "C" void NAME(dense)(const Dense& p, int64_t first, int64_t last) noexcept {
  by_blocks(p, first, last, [](const Dense& own, int64_t begin, int64_t end) {
    if (own.type == 0) product<float>(own, begin, end);
    else if (own.type == 1) product<Float16>(own, begin, end);
    else product<BFloat16>(own, begin, end);
  });
}

// The inputs of some vectors of rows as columns, [inputs, LANES] each. What is beyond the last row repeats it.
extern "C" void NAME(columns)(const Columns& p, int64_t first, int64_t last) noexcept {
  for (int64_t v = first; v < last; v++) {
    const float* rows[LANES];
    for (int64_t r = 0; r < LANES; r++) rows[r] = p.x + least(v * LANES + r, p.rows - 1) * p.inputs;
    float* out = p.out + v * LANES * p.inputs;
    int64_t i = 0;
    for (; i + LANES <= p.inputs; i += LANES) {
      Floats block[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) block[r] = load<Floats>(rows[r] + i);
      transpose(block);
      __builtin_memcpy(out + i * LANES, block, sizeof block);
    }
    for (; i < p.inputs; i++)
      for (int64_t r = 0; r < LANES; r++) out[i * LANES + r] = rows[r][i];
  }
}
