// Tasks of layers whose state is a matrix per head, Mamba-2 and the gated delta rule: recurrence.cpp computes them.
#pragma once
#include <cstdint>

enum class Rule : int { MAMBA, DELTA, BOUNDED_DELTA };

// What a state keeps at each token, and how much of the token it takes.
struct Gates {
  const float* decays;          // [tokens, heads, width]: dt of Mamba, a of the delta rule
  const float* factors;         // [tokens, heads]: b of the delta rule; null for Mamba, whose are made of dt
  const float *rates, *biases;  // [heads], A_log; [heads, width]
  float *decays_out, *factors_out;
  int64_t tokens, heads, width;  // width: 1, or that of a key
  Rule rule;
  float least, most;  // of Mamba's steps; otherwise of the decay's logarithm, if it is bounded, and of the factor

  int64_t items() const { return tokens; }
  int64_t work() const { return 32 * heads * (width + 1); }
};

// Outputs and states of sequences, token by token: an item is ROWS value dimensions of a head, at all tokens.
struct Recurrence {
  static constexpr int64_t ROWS = 32, MOST_KEY = 512, KEYS = 4;  // key_dim: at most MOST_KEY, a multiple of KEYS

  const float *keys, *queries;  // [batch, tokens, groups, key_dim], whose last dimensions are contiguous
  const float* values;          // [batch, tokens, heads, dim], likewise
  const float *decays, *factors;  // [batch, tokens, heads], and of decays [.., key_dim] if they are per key
  const float* weights;         // D of Mamba, [heads]
  const float* state;           // [batch, heads, dim, key_dim]; null: zeros
  const bool* mask;             // [batch, tokens], the tokens that change the state; null: all
  float *out, *state_out;       // [batch, tokens, heads, dim], as the state, which may be the same memory
  int64_t batch, tokens, heads, groups, dim, key_dim;
  int64_t key_strides[3], query_strides[3], value_strides[3];
  Rule rule;
  bool is_per_key;

  int64_t parts() const { return (dim + ROWS - 1) / ROWS; }
  int64_t items() const { return batch * heads * parts(); }
  int64_t work() const { return 3 * ROWS * key_dim * (tokens + 1); }
};
