// Products of float32 rows with weights: the interface between the kernels, quantized.cpp and dense.cpp, which are
// compiled once per instruction set, and operations.cpp, which chooses one of them.
#pragma once
#include <cstdint>

// With weights in MLX's affine format.
struct Quantized {
  const float* x;         // [rows, inputs]
  const uint32_t* words;  // [outputs, inputs * bits / 32]: weights, the first one in the lowest bits
  const void* scales;     // [outputs, inputs / group]
  const void* biases;     // likewise; a weight is scale * quantized + bias
  float* out;             // [rows, outputs]
  int64_t rows, inputs, outputs;
  int bits, group;        // 4 or 8; 32, 64 or 128
  int type;               // of scales and biases: 0 float32, 1 float16, 2 bfloat16
};

// With weights as they are.
struct Dense {
  const float* x;       // [rows, inputs]
  const void* weight;   // [outputs, inputs]
  const float* bias;    // [outputs], or null
  float* out;           // [rows, outputs]
  int64_t rows, inputs, outputs;
  int type;             // of the weights: as above
};

// Compute outputs from `first` to before `last`.
template <typename Product>
using Kernel = void (*)(const Product&, int64_t first, int64_t last) noexcept;
constexpr int64_t OUTPUTS = 32;  // outputs that a kernel computes together at most: a thread gets whole ones

extern "C" {
void quantized_portable(const Quantized&, int64_t, int64_t) noexcept;
void quantized_avx2(const Quantized&, int64_t, int64_t) noexcept;
void quantized_avx512(const Quantized&, int64_t, int64_t) noexcept;
void dense_portable(const Dense&, int64_t, int64_t) noexcept;
void dense_avx2(const Dense&, int64_t, int64_t) noexcept;
void dense_avx512(const Dense&, int64_t, int64_t) noexcept;
}
