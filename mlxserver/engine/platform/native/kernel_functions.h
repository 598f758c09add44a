// Tasks of the functions between products: functions.cpp computes them.
#pragma once
#include <cstdint>

// RMS norm.
struct Norm {
  const float *x, *weight;  // [rows, width], [width]
  float* out;
  int64_t rows, width;
  float eps;

  int64_t items() const { return rows; }
  int64_t work() const { return 2 * width; }
};

// Layer norm.
struct LayerNorm {
  const float *x, *weight, *bias;  // [rows, width], [width], [width] or null
  float* out;
  int64_t rows, width;
  float eps;

  int64_t items() const { return rows; }
  int64_t work() const { return 4 * width; }
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

// x + y.
struct Sum {
  const float *x, *y;
  float* out;
  int64_t size;

  int64_t items() const { return size; }
  int64_t work() const { return 1; }
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
};
