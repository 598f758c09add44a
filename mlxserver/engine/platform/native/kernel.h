// The interface between the kernels, quantized.cpp, dense.cpp, functions.cpp, attention.cpp, decode_attention.cpp,
// affine.cpp and logits.cpp, which are compiled once per instruction set, and the operations, which choose one of them. Arrays are
// row-contiguous unless there are strides, in elements.
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
  static constexpr int64_t TOGETHER = 1;
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
  static constexpr int64_t TOGETHER = 1;
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
  static constexpr int64_t TOGETHER = 1;
};

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

  int64_t items() const { return groups; }
  int64_t work() const { return 4 * group; }
  static constexpr int64_t TOGETHER = 1;
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
  static constexpr int64_t MOST_DIM = 256;                // of quantized keys and values
  int64_t parts() const { return (rows + ROWS - 1) / ROWS; }
  int64_t segments() const { return (tokens + SEGMENT - 1) / SEGMENT; }
  int64_t partial_width() const { return value_dim + 2; }
  int64_t items() const { return batch * groups * segments() * parts(); }
  int64_t work() const { return rows / parts() * (tokens / segments()) * (dim + value_dim + 8); }
  static constexpr int64_t TOGETHER = 1;
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
  static constexpr int64_t TOGETHER = 1;
};

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
  static constexpr int64_t TOGETHER = 1;
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
  static constexpr int64_t TOGETHER = 1;
};

// Logits of the tokens that are allowed, and -inf.
struct Mask {
  const float* logits;     // [rows, vocab]
  const uint8_t* allowed;  // [rows, bytes]: a bit per token, the first one the lowest
  float* out;
  int64_t rows, vocab, bytes;

  int64_t items() const { return rows; }
  int64_t work() const { return vocab; }
  static constexpr int64_t TOGETHER = 1;
};

// Indices of the largest values of a row, in order.
struct Top {
  const float* x;  // [rows, width]
  uint32_t* out;   // [rows, count]
  int64_t rows, width, count;

  static constexpr int64_t MOST = 64;
  int64_t items() const { return rows; }
  int64_t work() const { return width; }
  static constexpr int64_t TOGETHER = 1;
};

// Logarithm of the sum of a row's exponentials.
struct LogSum {
  const float* x;  // [rows, width]
  float* out;      // [rows]
  int64_t rows, width;

  int64_t items() const { return rows; }
  int64_t work() const { return 8 * width; }
  static constexpr int64_t TOGETHER = 1;
};

// Compute items from `first` to before `last`: outputs, rows or groups.
template <typename Task>
using Kernel = void (*)(const Task&, int64_t first, int64_t last) noexcept;

// All kernels and their tasks, for an instruction set.
#define KERNELS(X, LEVEL) \
  X(quantized, Quantized, LEVEL) \
  X(dense, Dense, LEVEL) \
  X(columns, Columns, LEVEL) \
  X(spread, Spread, LEVEL) \
  X(norm, Norm, LEVEL) \
  X(gate, Gate, LEVEL) \
  X(sum, Sum, LEVEL) \
  X(rotation, Rotation, LEVEL) \
  X(attention, Attention, LEVEL) \
  X(combine, SegmentedAttention, LEVEL) \
  X(quantize, Quantization, LEVEL) \
  X(layer_norm, LayerNorm, LEVEL) \
  X(gelu, Gelu, LEVEL) \
  X(swish, Swish, LEVEL) \
  X(block_attention, BlockAttention, LEVEL) \
  X(draw, Draw, LEVEL) \
  X(penalty, Penalty, LEVEL) \
  X(mask, Mask, LEVEL) \
  X(top, Top, LEVEL) \
  X(log_sum, LogSum, LEVEL)

#define DECLARED(KERNEL, TASK, LEVEL) void KERNEL##_##LEVEL(const TASK&, int64_t first, int64_t last) noexcept;
extern "C" {
KERNELS(DECLARED, portable)
KERNELS(DECLARED, avx2)
KERNELS(DECLARED, avx512)
}
#undef DECLARED
