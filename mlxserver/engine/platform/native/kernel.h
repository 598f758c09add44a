// Products of float32 rows with weights in MLX's affine format: the interface between kernel.cpp, which is compiled once
// per instruction set, and quantized.cpp, which chooses one of them.
#pragma once
#include <cstdint>

struct Product {
  const float* x;         // [rows, inputs]
  const uint32_t* words;  // [outputs, inputs * bits / 32]: weights, the first one in the lowest bits
  const void* scales;     // [outputs, inputs / group]
  const void* biases;     // likewise; a weight is scale * quantized + bias
  float* out;             // [rows, outputs]
  int64_t rows, inputs, outputs;
  int bits, group;        // 4 or 8; 32, 64 or 128
  int type;               // of scales and biases: 0 float32, 1 float16, 2 bfloat16
};

// Compute outputs from `first` to before `last`.
using Kernel = void (*)(const Product&, int64_t first, int64_t last) noexcept;
constexpr int64_t OUTPUTS = 32;  // outputs that a kernel computes together at most: a thread gets whole ones

extern "C" {
void product_portable(const Product&, int64_t, int64_t) noexcept;
void product_avx2(const Product&, int64_t, int64_t) noexcept;
void product_avx512(const Product&, int64_t, int64_t) noexcept;
}
