// Kernels of the logits of a step: penalties, masks, the likeliest tokens, draws from what filters leave. Compiled once per
// instruction set: LEVEL names it, LANES the floats of a vector.
//
// Rule 1: nothing is allocated and nothing is thrown: a kernel runs on threads that have no one to catch it.
// Rule 2: a row's sums are made in one order, whatever rows there are beside it.
#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 1024;       // weights that are added up in float32; blocks are in double precision
constexpr int CHAINS = 4;             // sums at a time, so that one addition does not wait for the one before
constexpr uint32_t ONE = 0x3f800000;  // bits of 1.0f
constexpr float INFINITE = __builtin_inff();
constexpr double TINY = 1e-300;

static_assert(Draw::UNIT % (CHAINS * LANES) == 0 && BLOCK % Draw::UNIT == 0);

// The largest value; -inf where all are NaN.
float largest(const float* x, int64_t size) {
  Floats tops[CHAINS];
  for (Floats& top : tops) top = splat(-INFINITE);
  for (int64_t i = 0; i < size; i += CHAINS * LANES)
    for (int n = 0; n < CHAINS; n++) {
      const int64_t at = i + n * LANES;
      const Floats own = at < size ? load_some(x + at, size - at, -INFINITE) : splat(-INFINITE);
      tops[n] = own > tops[n] ? own : tops[n];
    }
  for (int n = 1; n < CHAINS; n++) tops[0] = tops[n] > tops[0] ? tops[n] : tops[0];
  return most(tops[0]);
}

// Index of the first of the largest values; 0 where all are NaN.
int64_t likeliest(const float* x, int64_t size) {
  float top = -INFINITE;
  int64_t begin = 0;
  for (int64_t i = 0; i < size; i += BLOCK) {
    const float own = largest(x + i, least(BLOCK, size - i));
    if (own > top) {
      top = own;
      begin = i;
    }
  }
  for (int64_t i = begin; i < least(begin + BLOCK, size); i++)
    if (x[i] == top) return i;
  return 0;
}

// A weight is the probability of a token over that of the likeliest one. A logit that is NaN has none.
Floats weight_of(Floats logit, float top, float inverse_temperature) {
  const Floats x = (logit - top) * inverse_temperature;
  return x > splat(-87.0f) ? exponential(x) : Floats{};
}

struct Sum {
  double mass;
  int64_t count;
};

// Of the weights above a bound, which is not negative. size: a multiple of UNIT, here and below.
Sum above(const float* weights, int64_t size, float bound) {
  Sum sum{};
  for (int64_t begin = 0; begin < size; begin += BLOCK) {
    Floats masses[CHAINS] = {};
    Ints counts[CHAINS] = {};
    for (int64_t i = begin; i < least(begin + BLOCK, size); i += CHAINS * LANES)
      for (int n = 0; n < CHAINS; n++) {
        const Floats own = load<Floats>(weights + i + n * LANES);
        masses[n] += own > bound ? own : Floats{};
        counts[n] -= own > bound;  // true is -1
      }
    sum.mass += total((masses[0] + masses[1]) + (masses[2] + masses[3]));
    const Ints all = (counts[0] + counts[1]) + (counts[2] + counts[3]);
    for (int n = 0; n < LANES; n++) sum.count += all[n];
  }
  return sum;
}

bool any(Ints mask) {
  uint64_t words[LANES / 2], all = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) all |= word;
  return all;
}

// Write the weights above one bound and not above the other, and zeros up to the end of a unit. Returns their number
// with the zeros. `out` may be `weights`.
int64_t between(const float* weights, int64_t size, float low, float high, float* out) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < size; begin += LANES) {
    const Floats values = load<Floats>(weights + begin);
    if (!any((values > low) & (values <= high))) continue;
    for (int64_t i = begin; i < begin + LANES; i++) {
      out[count] = weights[i];
      count += (weights[i] > low) & (weights[i] <= high);
    }
  }
  const int64_t whole = Draw::padded(count);
  for (; count < whole; count++) out[count] = 0.0f;
  return whole;
}

// The least weight that is kept: those above it have less than `mass`, and are fewer than `count`. It is found by
// bisection of its bits, as floats that are not negative are ordered as their bits are. Once few weights are left
// between the bounds, they are copied to `room`, and only they are looked at again.
float least_kept(const float* weights, int64_t size, double mass, int64_t count, float* room) {
  uint32_t low = 0, high = ONE;  // `high` is kept, and so is all above it; `low` may be the least
  float below = 0.0f;            // the largest bound that is known not to be kept, or 0
  Sum taken{}, beyond{};         // of the weights that are no longer looked at, and of those above `high`
  int64_t inside = size;         // number of weights above `below` and not above `high`, at most
  while (low < high && inside) {
    const uint32_t middle = low + (high - low) / 2;
    const float bound = as_float(middle);
    const Sum found = above(weights, size, bound), all{taken.mass + found.mass, taken.count + found.count};
    if (all.mass < mass && all.count < count) {
      inside -= all.count - beyond.count;
      beyond = all;
      high = middle;
    } else {
      inside = all.count - beyond.count;
      low = middle + 1;
      below = bound;
    }
    if (Draw::FEW * (inside + Draw::UNIT) < size) {
      size = between(weights, size, below, as_float(high), room);
      weights = room;
      taken = beyond;
    }
  }
  return as_float(high);
}

// The first token whose weight, with those of the tokens before it, is above the share of the mass of all weights above
// a bound.
int64_t chosen(const float* weights, int64_t size, float bound, double share) {
  const double target = share * above(weights, size, bound).mass;
  double before = 0.0;
  int64_t begin = 0, token = 0;
  for (; begin < size; begin += BLOCK) {
    const double mass = above(weights + begin, least(BLOCK, size - begin), bound).mass;
    if (before + mass > target) break;
    before += mass;
  }
  for (int64_t i = begin; i < least(begin + BLOCK, size) && before <= target; i++)
    if (weights[i] > bound) {
      before += weights[i];
      token = i;  // the last one, where the block's sum was rounded up
    }
  return token;
}

int64_t drawn(const Draw& p, int64_t row) {
  const float* logits = p.logits + row * p.vocab;
  const int64_t best = likeliest(logits, p.vocab), size = Draw::padded(p.vocab);
  if (!p.settings) return best;
  const float *settings = p.settings + row * 4, top = logits[best];
  const float inverse = settings[0], top_p = settings[1], min_p = settings[2];
  const int64_t top_k = int64_t(settings[3]);
  if (inverse == 0.0f || !(__builtin_fabsf(top) < INFINITE)) return best;  // greedy, or nothing to draw from
  float *weights = p.weights + row * p.space(), *room = weights + size;
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats own = weight_of(load_some(logits + i, p.vocab - i, -INFINITE), top, inverse);
    __builtin_memcpy(weights + i, &own, sizeof own);
  }
  float kept = min_p;
  if (top_p < 1.0f || top_k < p.vocab) {
    const double mass = top_p < 1.0f ? top_p * above(weights, size, 0.0f).mass : INFINITE;
    const float filtered = least_kept(weights, size, mass > TINY ? mass : TINY, top_k, room);
    kept = filtered > kept ? filtered : kept;
  }
  const float bound = kept > 0.0f ? __builtin_nextafterf(kept, 0.0f) : 0.0f;
  return chosen(weights, size, bound, p.uniforms[row]);
}

double log_sum(const float* x, int64_t size) {
  const float top = largest(x, size);
  if (!(__builtin_fabsf(top) < INFINITE)) return top;
  double sum = 0.0;
  for (int64_t begin = 0; begin < size; begin += BLOCK) {
    Floats weights = {};
    for (int64_t i = begin; i < least(begin + BLOCK, size); i += LANES)
      weights += weight_of(load_some(x + i, size - i, -INFINITE), top, 1.0f);
    sum += total(weights);
  }
  return top + __builtin_log(sum);
}

// Indices of the `count` largest values, in order; of equal ones the first. NaN is the smallest.
void find_top(const float* x, int64_t size, int64_t count, uint32_t* out) {
  constexpr int64_t PIECE = 256;
  float values[Top::MOST];
  int64_t found = 0;
  for (int64_t begin = 0; begin < size; begin += PIECE) {
    const int64_t end = least(begin + PIECE, size);
    if (found == count && !(largest(x + begin, end - begin) > values[count - 1])) continue;
    for (int64_t i = begin; i < end; i++) {
      const float own = x[i] == x[i] ? x[i] : -INFINITE;
      if (found == count && !(own > values[count - 1])) continue;
      found += found < count;
      int64_t n = found - 1;
      for (; n && own > values[n - 1]; n--) {
        values[n] = values[n - 1];
        out[n] = out[n - 1];
      }
      values[n] = own;
      out[n] = uint32_t(i);
    }
  }
}

void penalize(const Penalty& p, int64_t row) {
  const float *x = p.logits + row * p.vocab, *generated = p.generated + row * p.vocab;
  const uint8_t* prompted = p.prompted + row * p.vocab;
  const float* penalties = p.penalties + row * 3;
  const float frequency = penalties[0], presence = penalties[1], repetition = penalties[2];
  float* __restrict out = p.out + row * p.vocab;
  for (int64_t i = 0; i < p.vocab; i++) {
    const float own = x[i], count = generated[i], seen = count + float(prompted[i]);
    const float repeated = own > 0.0f ? own / repetition : own * repetition;
    out[i] = (seen > 0.0f ? repeated : own) - count * frequency - (count > 0.0f ? presence : 0.0f);
  }
}

void mask(const Mask& p, int64_t row) {
  const float* x = p.logits + row * p.vocab;
  const uint8_t* allowed = p.allowed + row * p.bytes;
  float* out = p.out + row * p.vocab;
  Words lane;
  for (int n = 0; n < LANES; n++) lane[n] = n;
  for (int64_t i = 0; i < p.vocab; i += LANES) {
    const uint32_t next = LANES > 8 && i / 8 + 1 < p.bytes ? allowed[i / 8 + 1] : 0;
    const uint32_t bits = (allowed[i / 8] | next << 8) >> (i % 8);
    const Words is_allowed = (Words{} + bits) >> lane & 1u;
    const Floats own = load_some(x + i, p.vocab - i, 0.0f);
    store_some(is_allowed != 0u ? own : splat(-INFINITE), p.vocab - i, out + i);
  }
}

}  // namespace

extern "C" {
void NAME(penalty)(const Penalty& p, int64_t first, int64_t last) noexcept {
  for (int64_t row = first; row < last; row++) penalize(p, row);
}
void NAME(mask)(const Mask& p, int64_t first, int64_t last) noexcept {
  for (int64_t row = first; row < last; row++) mask(p, row);
}
void NAME(top)(const Top& p, int64_t first, int64_t last) noexcept {
  for (int64_t row = first; row < last; row++) find_top(p.x + row * p.width, p.width, p.count, p.out + row * p.count);
}
void NAME(log_sum)(const LogSum& p, int64_t first, int64_t last) noexcept {
  for (int64_t row = first; row < last; row++) p.out[row] = float(log_sum(p.x + row * p.width, p.width));
}
void NAME(draw)(const Draw& p, int64_t first, int64_t last) noexcept {
  for (int64_t row = first; row < last; row++) p.out[row] = uint32_t(drawn(p, row));
}
}
