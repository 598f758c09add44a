// Tasks of products of rows with weights: quantized.cpp and dense.cpp compute them.
#pragma once
#include <cstdint>

// Vectors of rows that are multiplied as columns. A rest that fills less than half a vector is not.
inline int64_t vectors_of(int64_t rows, int64_t lanes) { return rows / lanes + (2 * (rows % lanes) > lanes); }

// Parts of so many, the last of which may be smaller.
inline int64_t parts_of(int64_t all, int64_t size) { return (all + size - 1) / size; }

// Product of float32 rows with weights, [outputs, inputs]. An item is some outputs of a block of rows, whose inputs stay in
// a second-level cache.
struct Product {
  const float* x;        // [rows, inputs]
  const float* columns;  // [vectors, inputs, lanes], the same rows; null for few rows
  const float* bias;     // [outputs], or null
  float* out;            // [rows, outputs]
  int64_t rows, inputs, outputs;

  static constexpr int64_t OUTPUTS = 48, ROWS = 144;  // of an item, at most
  int64_t block() const { return parts_of(parts_of(rows, parts_of(rows, ROWS)), 48) * 48; }  // rows of one, all alike
  int64_t panels() const { return parts_of(outputs, OUTPUTS); }
  int64_t items() const { return parts_of(rows, block()) * panels(); }
  int64_t work() const { return (rows < block() ? rows : block()) * inputs * OUTPUTS; }

  // Become the product of `count` of the rows. With columns, the first one begins a vector.
  void take(int64_t row, int64_t count) {
    x += row * inputs, out += row * outputs, rows = count;
    if (columns) columns += row * inputs;
  }
};

// With weights as they are.
struct Dense : Product {
  const void* weight;
  int type;  // 0 float32, 1 float16, 2 bfloat16
};

// With weights in MLX's affine format.
struct Quantized : Product {
  const uint32_t* words;  // [outputs, inputs * bits / 32]: weights, the first one in the lowest bits
  const void* scales;     // [outputs, inputs / group]
  const void* biases;     // likewise; a weight is scale * quantized + bias
  int bits, group;        // 4 or 8; 32, 64 or 128
  int type;               // of scales and biases: as above
  const float* spread = nullptr;  // of FEW rows or fewer, as Spread makes it

  static constexpr int64_t FEW = 3;
};

// Few rows as a vector of words meets them: its n-th weights of all words are multiplied at once.
struct Spread {
  const float* x;  // [rows, inputs]
  float* out;      // [rows, size()]: inputs in blocks of [32 / bits, lanes], scaled to weights that stay where they are
                   // in their words; then the sums of groups, up to a whole vector of them. 0 where there are no inputs
  int64_t rows, inputs, lanes;
  int bits, group;

  int64_t blocks() const { return (inputs * bits / 32 + lanes - 1) / lanes; }
  int64_t sums() const { return blocks() * lanes * (32 / bits); }  // where they begin
  int64_t size() const { return sums() + (inputs / group + lanes - 1) / lanes * lanes; }
  int64_t items() const { return rows; }
  int64_t work() const { return 4 * inputs; }
};

// Columns of rows: of as many at a time as a vector has lanes, each input's values lie beside each other.
struct Columns {
  const float* x;  // [rows, inputs]
  float* out;      // [vectors, inputs, lanes]
  int64_t rows, inputs, vectors, lanes;

  int64_t items() const { return vectors; }
  int64_t work() const { return lanes * inputs; }
};
