// The interface between the kernels, quantized.cpp, dense.cpp, functions.cpp and attention.cpp, which are compiled once
// per instruction set, and operations.cpp, which chooses one of them. Arrays are row-contiguous unless there are strides, in elements.
#pragma once
#include <cstdint>

// Vectors of rows that are multiplied as columns. A rest that fills less than half a vector is not.
inline int64_t vectors_of(int64_t rows, int64_t lanes) { return rows / lanes + (2 * (rows % lanes) > lanes); }

// Product of float32 rows with weights, [outputs, inputs].
struct Product {
  const float* x;        // [rows, inputs]
  const float* columns;  // [vectors, inputs, lanes], the same rows; null for few rows
  const float* bias;     // [outputs], or null
  float* out;            // [rows, outputs]
  int64_t rows, inputs, outputs;

  int64_t items() const { return outputs; }
  int64_t work() const { return rows * inputs; }
  static constexpr int64_t TOGETHER = 48;
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
};

// Columns of rows: of as many at a time as a vector has lanes, each input's values lie beside each other.
struct Columns {
  const float* x;  // [rows, inputs]
  float* out;      // [vectors, inputs, lanes]
  int64_t rows, inputs, vectors, lanes;

  int64_t items() const { return vectors; }
  int64_t work() const { return lanes * inputs; }
  static constexpr int64_t TOGETHER = 1;
};

// RMS norm.
struct Norm {
  const float *x, *weight;  // [rows, width], [width]
  float* out;
  int64_t rows, width;
  float eps;

  int64_t items() const { return rows; }
  int64_t work() const { return 2 * width; }
  static constexpr int64_t TOGETHER = 1;
};

// Layer norm.
struct LayerNorm {
  const float *x, *weight, *bias;  // [rows, width], [width], [width] or null
  float* out;
  int64_t rows, width;
  float eps;

  int64_t items() const { return rows; }
  int64_t work() const { return 4 * width; }
  static constexpr int64_t TOGETHER = 1;
};

// GELU.
struct Gelu {
  const float* x;
  float* out;
  int64_t size;

  int64_t items() const { return size; }
  int64_t work() const { return 8; }
  static constexpr int64_t TOGETHER = 64;
};

// x times the sigmoid of slope * x + cubic * x^3: SiLU, and the approximations of GELU.
struct Swish {
  const float* x;
  float* out;
  int64_t size;
  float slope, cubic;

  int64_t items() const { return size; }
  int64_t work() const { return 4; }
  static constexpr int64_t TOGETHER = 64;
};

// silu(gate) * x.
struct Gate {
  const float *gate, *x;
  float* out;
  int64_t size;

  int64_t items() const { return size; }
  int64_t work() const { return 4; }
  static constexpr int64_t TOGETHER = 64;
};

// Rotary embedding of pairs of the first half and the second.
struct Rotation {
  const float* x;                  // [batch, heads, tokens, dim], whose last dimension is contiguous
  const float *cosines, *sines;    // [batch, tokens, dim / 2], [batch, tokens, dim] with minus sines first
  float* out;
  int64_t batch, heads, tokens, dim;
  int64_t strides[3];
  int64_t angles;                  // from one sequence's cosines to the next one's; 0 where they are the same

  int64_t items() const { return batch * heads * tokens; }
  int64_t work() const { return 2 * dim; }
  static constexpr int64_t TOGETHER = 1;
};

// Attention of few tokens per sequence. Tokens of all heads that share keys and values are the rows of a group.
struct Attention {
  const float* q;                                      // [batch, groups, rows, dim]
  const float *keys, *values;                          // [batch, groups, tokens, dim], a group's are contiguous
  const float* mask;                                   // [batch, length, tokens] addends of a head's rows, or null
  float *scores, *out;                                 // [batch, groups, rows, tokens], [batch, groups, rows, value_dim]
  int64_t batch, groups, rows, tokens, dim, value_dim;
  int64_t key_strides[2], value_strides[2], mask_stride, length;
  float scale;
  bool is_causal;                                      // the last `length` tokens are the queries' own

  static constexpr int64_t ROWS = 24;                  // of an item
  int64_t parts() const { return (rows + ROWS - 1) / ROWS; }
  int64_t items() const { return batch * groups * parts(); }
  int64_t work() const { return rows / parts() * tokens * (dim + value_dim + 8); }
  static constexpr int64_t TOGETHER = 1;
};

// Attention of many tokens per sequence, in blocks of keys. The last dimension of each array is contiguous; strides are
// those of a sequence, a head and a token.
struct BlockAttention {
  const float *q, *keys, *values;  // [batch, heads, length, dim], [batch, groups, tokens, dim], [.., value_dim]
  const float* mask;               // [batch, heads, length, tokens] addends of scores, or null
  float* out;                      // [batch, length, heads, value_dim]
  int64_t batch, heads, groups, length, tokens, dim, value_dim;
  int64_t q_strides[3], key_strides[3], value_strides[3], mask_strides[3];
  float scale;
  bool is_causal;                  // the last `length` tokens are the queries' own

  static constexpr int64_t ROWS = 96;       // of an item
  static constexpr int64_t MOST_DIM = 768;  // of keys and of values
  int64_t parts() const { return (length + ROWS - 1) / ROWS; }
  int64_t items() const { return batch * heads * parts(); }
  int64_t work() const { return length / parts() * tokens * (dim + value_dim + 8); }
  static constexpr int64_t TOGETHER = 1;
};

// Compute items from `first` to before `last`: outputs, rows or groups.
template <typename Task>
using Kernel = void (*)(const Task&, int64_t first, int64_t last) noexcept;

// Kernels of an instruction set.
#define KERNELS(LEVEL)                                        \
  void quantized_##LEVEL(const Quantized&, int64_t, int64_t) noexcept; \
  void dense_##LEVEL(const Dense&, int64_t, int64_t) noexcept;         \
  void columns_##LEVEL(const Columns&, int64_t, int64_t) noexcept;     \
  void norm_##LEVEL(const Norm&, int64_t, int64_t) noexcept;           \
  void gate_##LEVEL(const Gate&, int64_t, int64_t) noexcept;           \
  void rotation_##LEVEL(const Rotation&, int64_t, int64_t) noexcept;   \
  void attention_##LEVEL(const Attention&, int64_t, int64_t) noexcept;   \
  void layer_norm_##LEVEL(const LayerNorm&, int64_t, int64_t) noexcept;  \
  void gelu_##LEVEL(const Gelu&, int64_t, int64_t) noexcept;             \
  void swish_##LEVEL(const Swish&, int64_t, int64_t) noexcept;           \
  void block_attention_##LEVEL(const BlockAttention&, int64_t, int64_t) noexcept;

extern "C" {
KERNELS(portable)
KERNELS(avx2)
KERNELS(avx512)
}
