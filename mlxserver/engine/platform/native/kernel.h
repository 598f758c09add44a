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
  int bits, group;
  int type;               // of scales and biases: 0 float32, 1 float16, 2 bfloat16
};

// Compute outputs from `first` to before `last`. scratch: scratch_floats() floats, aligned to 64 bytes.
using Kernel = void (*)(const Product&, int64_t first, int64_t last, float* scratch);
constexpr int64_t PANEL = 4;     // outputs that are computed together
constexpr int64_t DEPTH = 1024;  // inputs of a panel that are dequantized at once: 16 KB, half of a first-level cache
constexpr int64_t scratch_floats(int64_t inputs, int group) {
  return PANEL * DEPTH + 2 * PANEL * (inputs / group + 1);
}

extern "C" {
void product_portable(const Product&, int64_t, int64_t, float*);
void product_avx2(const Product&, int64_t, int64_t, float*);
void product_avx512(const Product&, int64_t, int64_t, float*);
}
