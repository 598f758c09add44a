// Kernels of layers whose state is a matrix per head: Mamba-2 (Dao and Gu 2024) and the gated delta rule (Yang et al.
// 2025). Compiled once per instruction set: LEVEL names it, LANES the floats of a vector.
//
// No row of a state, which is a value dimension, needs another one: each is a lane, so that no sum is across lanes, and
// the rows of an item stay in the caches from the first token to the last one.
//
// Rule: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int VECTORS = Recurrence::ROWS / LANES;  // of the rows of an item
constexpr int SUMS = 8 / VECTORS;                  // of each row, because one would wait for its last addition

struct Vectors {
  Floats of[VECTORS];
};

// log(1 + exp(x)): for y = exp(-|x|) log(1 + y) is 2 artanh(y / (2 + y)), whose terms fall to 1/9 at least.
Floats softplus(Floats x) {
  const Floats y = exponential(x < 0.0f ? x : -x), z = y / (2.0f + y), square = z * z;
  Floats sum = splat(1.0f / 15);
  for (int n = 13; n > 0; n -= 2) sum = sum * square + 1.0f / n;
  return (x > 0.0f ? x : Floats{}) + 2.0f * z * sum;
}

Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Decays of one head at one token; or, if there is one per head, of all heads. For Mamba their factors, too.
void decay(const Gates& p, int64_t token, int64_t head) {
  const int64_t row = head * p.width, at = token * p.heads * p.width + row, width = p.width > 1 ? p.width : p.heads;
  for (int64_t i = 0; i < width; i += LANES) {
    const int64_t rest = width - i;
    const Floats x = load_some(p.decays + at + i, rest, 0.0f) + load_some(p.biases + row + i, rest, 0.0f);
    const Floats rate = exponential(p.width > 1 ? splat(p.rates[head]) : load_some(p.rates + i, rest, 0.0f));
    Floats power;
    if (p.rule == Rule::BOUNDED_DELTA) {
      power = p.least * sigmoid(rate * x);
    } else {
      Floats step = softplus(x);
      if (p.rule == Rule::MAMBA) {
        step = step > p.least ? step : splat(p.least);
        step = step < p.most ? step : splat(p.most);
        store_some(step, rest, p.factors_out + at + i);
      }
      power = -rate * step;
    }
    store_some(exponential(power), rest, p.decays_out + at + i);
  }
}

void gates(const Gates& p, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; token++) {
    for (int64_t head = 0; head < (p.width > 1 ? p.heads : 1); head++) decay(p, token, head);
    if (p.rule == Rule::MAMBA) continue;
    for (int64_t i = 0; i < p.heads; i += LANES) {
      const int64_t at = token * p.heads + i, rest = p.heads - i;
      store_some(p.most * sigmoid(load_some(p.factors + at, rest, 0.0f)), rest, p.factors_out + at);
    }
  }
}

Vectors total(const Vectors (&sums)[SUMS]) {
  Vectors all = sums[0];
#pragma GCC unroll 4
  for (int n = 1; n < SUMS; n++)
#pragma GCC unroll 8
    for (int r = 0; r < VECTORS; r++) all.of[r] += sums[n].of[r];
  return all;
}

// What the state, decayed, has for a key. Decays per key are put into it.
template <bool IS_PER_KEY>
Vectors recall(Vectors* state, const float* key, const float* decay, int64_t key_dim) {
  Vectors sums[SUMS] = {};
  for (int64_t d = 0; d < key_dim; d += SUMS)
#pragma GCC unroll 4
    for (int n = 0; n < SUMS; n++) {
      const Floats one = splat(key[d + n]), factor = splat(decay[IS_PER_KEY ? d + n : 0]);
#pragma GCC unroll 8
      for (int r = 0; r < VECTORS; r++) {
        Floats& own = state[d + n].of[r];
        if constexpr (IS_PER_KEY) own *= factor;
        sums[n].of[r] += own * one;
      }
    }
  Vectors found = total(sums);
  if constexpr (!IS_PER_KEY)
    for (int r = 0; r < VECTORS; r++) found.of[r] *= *decay;
  return found;
}

// Add the product of a key and what each row has of it to the state, and find what this has for a query.
inline Vectors change(Vectors* state, const float* key, const float* query, float decay, Vectors added,
                      int64_t key_dim) {
  Vectors sums[SUMS] = {};
  for (int64_t d = 0; d < key_dim; d += SUMS)
#pragma GCC unroll 4
    for (int n = 0; n < SUMS; n++) {
      const Floats one = splat(key[d + n]), other = splat(query[d + n]);
#pragma GCC unroll 8
      for (int r = 0; r < VECTORS; r++) {
        Floats& own = state[d + n].of[r];
        own = own * decay + added.of[r] * one;
        sums[n].of[r] += own * other;
      }
    }
  return total(sums);
}

// Rows of a state, from memory and to it. A row that there is not is zeros.
void read(const float* from, int64_t rows, int64_t key_dim, Vectors* state) {
  for (int64_t d = 0; d < key_dim; d += LANES)
    for (int r = 0; r < VECTORS; r++) {
      Floats part[LANES];
      for (int64_t i = 0, row = r * LANES; i < LANES; i++, row++)
        part[i] = row < rows ? load_some(from + row * key_dim + d, key_dim - d, 0.0f) : Floats{};
      transpose(part);
      for (int64_t i = 0; i < least(LANES, key_dim - d); i++) state[d + i].of[r] = part[i];
    }
}

void write(const Vectors* state, int64_t rows, int64_t key_dim, float* to) {
  for (int64_t d = 0; d < key_dim; d += LANES)
    for (int r = 0; r < VECTORS; r++) {
      Floats part[LANES] = {};
      for (int64_t i = 0; i < least(LANES, key_dim - d); i++) part[i] = state[d + i].of[r];
      transpose(part);
      for (int64_t i = 0, row = r * LANES; i < LANES && row < rows; i++, row++)
        store_some(part[i], key_dim - d, to + row * key_dim + d);
    }
}

// Where a token of a head lies.
struct Token {
  const float *key, *query, *value, *decay;
  float* out;
  float factor, weight;
  bool is_kept;
};

Token token_of(const Recurrence& p, int64_t batch, int64_t head, int64_t token) {
  const int64_t at = (batch * p.tokens + token) * p.heads + head, group = head / (p.heads / p.groups);
  auto place = [&](const int64_t* strides, int64_t n) {
    return batch * strides[0] + token * strides[1] + n * strides[2];
  };
  return {p.keys + place(p.key_strides, group),
          p.queries + place(p.query_strides, group),
          p.values + place(p.value_strides, head),
          p.decays + at * (p.is_per_key ? p.key_dim : 1),
          p.out + at * p.dim,
          p.factors[at],
          p.weights ? p.weights[head] : 0.0f,
          !p.mask || p.mask[batch * p.tokens + token]};
}

// A token's change of some rows, and what they make of it.
template <bool IS_DELTA, bool IS_PER_KEY>
Vectors step(const Token& token, const Vectors& values, int64_t key_dim, Vectors* state) {
  Vectors added = values;
  if constexpr (IS_DELTA) {
    const Vectors known = recall<IS_PER_KEY>(state, token.key, token.decay, key_dim);
    for (int r = 0; r < VECTORS; r++) added.of[r] -= known.of[r];
  }
  for (int r = 0; r < VECTORS; r++) added.of[r] *= token.factor;
  Vectors found = change(state, token.key, token.query, IS_PER_KEY ? 1.0f : *token.decay, added, key_dim);
  if constexpr (!IS_DELTA)
    for (int r = 0; r < VECTORS; r++) found.of[r] += values.of[r] * token.weight;
  return found;
}

// The next token lies too far away for the CPU to see it.
void prefetch(const Recurrence& p, const Token& token) {
  for (int64_t d = 0; d < p.key_dim; d += 16) {
    __builtin_prefetch(token.key + p.key_strides[1] + d);
    __builtin_prefetch(token.query + p.query_strides[1] + d);
    if (p.is_per_key) __builtin_prefetch(token.decay + p.heads * p.key_dim + d);
  }
}

// All tokens of the rows from `row` on of a head.
template <bool IS_DELTA, bool IS_PER_KEY>
void scan(const Recurrence& p, int64_t batch, int64_t head, int64_t row) {
  const int64_t rows = least(p.ROWS, p.dim - row), place = ((batch * p.heads + head) * p.dim + row) * p.key_dim;
  Vectors state[Recurrence::MOST_KEY];
  if (p.state)
    read(p.state + place, rows, p.key_dim, state);
  else
    for (int64_t d = 0; d < p.key_dim; d++) state[d] = {};
  for (int64_t n = 0; n < p.tokens; n++) {
    const Token token = token_of(p, batch, head, n);
    prefetch(p, token);
    Vectors values, found{};
    for (int r = 0; r < VECTORS; r++) values.of[r] = load_some(token.value + row + r * LANES, rows - r * LANES, 0.0f);
    if (token.is_kept) found = step<IS_DELTA, IS_PER_KEY>(token, values, p.key_dim, state);
    for (int64_t i = 0; i < rows; i += LANES) store_some(found.of[i / LANES], rows - i, token.out + row + i);
  }
  write(state, rows, p.key_dim, p.state_out + place);
}

// One token of a row. The lanes are dimensions of the key here: to turn a state takes longer than to compute a token.
template <bool IS_DELTA, bool IS_PER_KEY>
float step(const Token& token, float value, int64_t key_dim, const float* from, float* to) {
  auto decayed = [&](int64_t d) {
    const Floats own = from ? load_some(from + d, key_dim - d, 0.0f) : Floats{};
    return own * (IS_PER_KEY ? load_some(token.decay + d, key_dim - d, 0.0f) : splat(*token.decay));
  };
  float added = value;
  if constexpr (IS_DELTA) {
    Floats sum = {};
    for (int64_t d = 0; d < key_dim; d += LANES) sum += decayed(d) * load_some(token.key + d, key_dim - d, 0.0f);
    added -= total(sum);
  }
  added *= token.factor;
  Floats sum = {};
  for (int64_t d = 0; d < key_dim; d += LANES) {
    const Floats own = decayed(d) + added * load_some(token.key + d, key_dim - d, 0.0f);
    sum += own * load_some(token.query + d, key_dim - d, 0.0f);
    store_some(own, key_dim - d, to + d);
  }
  return total(sum) + value * token.weight;
}

// The same for one token.
template <bool IS_DELTA, bool IS_PER_KEY>
void scan_one(const Recurrence& p, int64_t batch, int64_t head, int64_t row) {
  const Token token = token_of(p, batch, head, 0);
  for (const int64_t last = least(row + p.ROWS, p.dim); row < last; row++) {
    const int64_t place = ((batch * p.heads + head) * p.dim + row) * p.key_dim;
    const float* from = p.state ? p.state + place : nullptr;
    float* to = p.state_out + place;
    token.out[row] = token.is_kept ? step<IS_DELTA, IS_PER_KEY>(token, token.value[row], p.key_dim, from, to) : 0.0f;
    if (!token.is_kept)
      for (int64_t d = 0; d < p.key_dim; d++) to[d] = from ? from[d] : 0.0f;
  }
}

template <bool IS_DELTA, bool IS_PER_KEY>
void scan(const Recurrence& p, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; item++) {
    const int64_t row = item % p.parts() * p.ROWS, of_head = item / p.parts();
    const int64_t head = of_head % p.heads, batch = of_head / p.heads;
    if (p.tokens == 1)
      scan_one<IS_DELTA, IS_PER_KEY>(p, batch, head, row);
    else
      scan<IS_DELTA, IS_PER_KEY>(p, batch, head, row);
  }
}

void recurrence(const Recurrence& p, int64_t first, int64_t last) {
  if (p.rule == Rule::MAMBA)
    scan<false, false>(p, first, last);
  else if (p.is_per_key)
    scan<true, true>(p, first, last);
  else
    scan<true, false>(p, first, last);
}

}  // namespace

extern "C" {
void NAME(gates)(const Gates& p, int64_t first, int64_t last) noexcept { gates(p, first, last); }
void NAME(recurrence)(const Recurrence& p, int64_t first, int64_t last) noexcept { recurrence(p, first, last); }
}
