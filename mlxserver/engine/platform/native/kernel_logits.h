// Tasks of the logits of a step: logits.cpp computes them.
#pragma once
#include <cstdint>

// Draw of a token per row, or its likeliest one.
struct Draw {
  const float* logits;    // [rows, vocab]
  const float* settings;  // [rows, 4]: 1 / temperature, 0 for the likeliest token; top_p; min_p; top_k. Or null
  const float* uniforms;  // [rows]: where in the cumulative distribution, in [0, 1)
  float* weights;         // [rows, space()], to work in
  uint32_t* out;          // [rows]
  int64_t rows, vocab;

  static constexpr int64_t UNIT = 64;  // weights are looked at in so many
  static constexpr int64_t FEW = 64;   // weights that are copied to be looked at again are one in so many, at most
  static int64_t padded(int64_t size) { return (size + UNIT - 1) / UNIT * UNIT; }
  int64_t space() const { return padded(vocab) + padded(vocab / FEW + 1); }
  int64_t items() const { return rows; }
  int64_t work() const { return (settings ? 16 : 1) * vocab; }
};

// Penalties of tokens that were generated or are in the prompt.
struct Penalty {
  const float *logits, *generated;  // [rows, vocab]; how often each token was
  const uint8_t* prompted;          // [rows, vocab], 1 or 0
  const float* penalties;           // [rows, 3]: frequency, presence, repetition
  float* out;
  int64_t rows, vocab;

  int64_t items() const { return rows; }
  int64_t work() const { return 4 * vocab; }
};

// Logits of the tokens that are allowed, and -inf.
struct Mask {
  const float* logits;     // [rows, vocab]
  const uint8_t* allowed;  // [rows, bytes]: a bit per token, the first one the lowest
  float* out;
  int64_t rows, vocab, bytes;

  int64_t items() const { return rows; }
  int64_t work() const { return vocab; }
};

// Indices of the largest values of a row, in order.
struct Top {
  const float* x;  // [rows, width]
  uint32_t* out;   // [rows, count]
  int64_t rows, width, count;

  static constexpr int64_t MOST = 64;
  int64_t items() const { return rows; }
  int64_t work() const { return width; }
};

// Logarithm of the sum of a row's exponentials.
struct LogSum {
  const float* x;  // [rows, width]
  float* out;      // [rows]
  int64_t rows, width;

  int64_t items() const { return rows; }
  int64_t work() const { return 8 * width; }
};
