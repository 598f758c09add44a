// Tasks of attention, and of the cache that it reads: attention.cpp, decode_attention.cpp and affine.cpp compute them.
#pragma once
#include <cstdint>

// Keys or values, [batch, groups, tokens, dim], in float32 or in MLX's affine format. A group's are contiguous.
struct Stored {
  struct Part {
    const void* data;
    int64_t strides[2];  // from one sequence to the next one, and from one group
  };
  int bits, group;  // of words: 4 or 8; 32, 64 or 128. Or 32 bits, which is float32
  Part values, scales, biases;  // floats alone; or words, as above, with float32 [.., dim / group]
};

// Vectors in MLX's affine format, bit for bit as mx.quantize has them.
struct Quantization {
  const float* x;  // [groups, group]
  uint32_t* words;
  float *scales, *biases;
  int64_t groups;
  int bits, group;
  static constexpr int MOST_GROUP = 128;

  int64_t items() const { return groups; }
  int64_t work() const { return 4 * group; }
};

// Vectors in MLX's affine format as float32.
struct Dequantization {
  const uint32_t* words;
  const float *scales, *biases;
  float* out;  // [groups, group]
  int64_t groups;
  int bits, group;

  int64_t items() const { return groups; }
  int64_t work() const { return group; }
};

// Attention of few tokens per sequence, in segments of keys. Tokens of all heads that share keys and values are the rows
// of a group.
struct Attention {
  const float* q;                                      // [batch, groups, rows, dim]
  Stored keys, values;                                 // as above
  const float* mask;                                   // [batch, length, tokens] addends of a head's rows, or null
  float *partial, *out;                                // [batch, groups, segments, rows, value_dim + 2] of totals, the
                                                       // largest score and the sum, [batch, groups, rows, value_dim]
  int64_t batch, groups, rows, tokens, dim, value_dim;
  int64_t mask_stride, length;
  float scale;
  bool is_causal;                                      // the last `length` tokens are the queries' own
  const int32_t* offsets = nullptr;                    // [batch] tokens before the queries' own, where they differ

  int64_t seen(int64_t sequence) const {
    return offsets && offsets[sequence] + length < tokens ? offsets[sequence] + length : tokens;
  }

  static constexpr int64_t ROWS = 24, SEGMENT = 512;   // rows and tokens of an item
  static constexpr int64_t MOST_DIM = 256;             // of quantized keys and values
  int64_t parts() const { return (rows + ROWS - 1) / ROWS; }
  int64_t segments() const { return (tokens + SEGMENT - 1) / SEGMENT; }
  int64_t partial_width() const { return value_dim + 2; }
  int64_t partial_size() const { return segments() > 1 ? batch * groups * segments() * rows * partial_width() : 0; }
  int64_t items() const { return batch * groups * segments() * parts(); }
  int64_t work() const { return rows / parts() * (tokens / segments()) * (dim + value_dim + 8); }
};

// Attention whose segments are computed and are to be combined.
struct SegmentedAttention : Attention {
  int64_t items() const { return batch * groups * rows; }
  int64_t work() const { return segments() * value_dim; }
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
};
