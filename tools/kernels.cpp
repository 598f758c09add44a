// The native kernels beside plain loops in double precision, without MLX: for CPUs that an emulator stands for.
// tools/check_kernels.sh compiles and runs it. A line per kernel; exit status 1 if one computes wrongly.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "kernel.h"

#define JOINED(kernel, level) kernel##_##level
#define LEVEL_NAME(kernel, level) JOINED(kernel, level)
#define KERNEL(kernel) LEVEL_NAME(kernel, LEVEL)

using Values = std::vector<float>;

std::mt19937 generator(1);
int failures = 0;

Values random_values(int64_t size) {
  std::normal_distribution<float> normal;
  Values values(size);
  for (float& value : values) value = normal(generator);
  return values;
}

// What a kernel has computed beside what it should have; beyond the output lies what it must leave alone.
class Comparison {
 public:
  explicit Comparison(const char* name) : name_(name) {}
  ~Comparison() {
    std::printf("%-10s %6d cases, largest error %.1e%s\n", name_, cases_, largest_, wrong_ ? "  WRONG" : "");
    failures += wrong_ > 0;
  }

  void add(int64_t size, const std::function<void(float*)>& compute, const std::function<double(int64_t)>& exact) {
    constexpr int64_t GUARD = 64;
    Values out(size + GUARD, 12345.0f);
    compute(out.data());
    for (int64_t i = 0; i < size; i++) {
      const double error = std::fabs(out[i] - exact(i)) / (1.0 + std::fabs(exact(i)));
      if (!(error < 2e-5)) wrong_++;
      if (!(error < largest_)) largest_ = error;
    }
    for (int64_t i = size; i < size + GUARD; i++) wrong_ += out[i] != 12345.0f;
    cases_++;
  }

 private:
  const char* name_;
  int cases_ = 0, wrong_ = 0;
  double largest_ = 0.0;
};

// Values as an array of a type, and in float32 as that array has them.
struct Typed {
  std::vector<char> bytes;
  Values exact;
};

uint16_t half_of(float value) {  // normal numbers only, cut off
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const int exponent = int(bits >> 23 & 255) - 112;
  return exponent <= 0 ? bits >> 16 & 0x8000 : (bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023);
}

float widened(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float value = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
  return half & 0x8000 ? -value : value;
}

Typed typed(Values values, int type) {
  if (type == 0) return {std::vector<char>((char*)values.data(), (char*)(values.data() + values.size())), values};
  std::vector<uint16_t> halves;
  for (float& value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    halves.push_back(type == 1 ? half_of(value) : bits >> 16);
    bits = uint32_t(halves.back()) << 16;
    if (type == 1) value = widened(halves.back());
    else std::memcpy(&value, &bits, 4);
  }
  return {std::vector<char>((char*)halves.data(), (char*)(halves.data() + halves.size())), values};
}

double dot(const float* a, const float* b, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; i++) sum += double(a[i]) * b[i];
  return sum;
}

// In two calls, as two threads would compute it.
template <typename Task>
void in_two(const Task& task, Kernel<Task> kernel) {
  const int64_t middle = task.items() / 2 / together<Task>() * together<Task>();
  kernel(task, 0, middle);
  kernel(task, middle, task.items());
}

// The rows as columns, as products have them for more than one vector of rows.
Values columns_of(const Values& x, int64_t rows, int64_t inputs) {
  const int64_t vectors = vectors_of(rows, LANES);
  Values columns(vectors > 1 ? vectors * inputs * LANES : 0);
  if (vectors > 1) in_two(Columns{x.data(), columns.data(), rows, inputs, vectors, LANES}, KERNEL(columns));
  return columns;
}

Product product_of(const Values& x, const Values& columns, const float* bias, float* out, int64_t rows, int64_t inputs,
                   int64_t outputs) {
  return {x.data(), columns.empty() ? nullptr : columns.data(), bias, out, rows, inputs, outputs};
}

void check_dense() {
  Comparison comparison("dense");
  for (int64_t rows : {1, 2, 3, 4, 5, 7, 13, 21, 64, 65, 130, 151})
    for (int64_t inputs : {1, 3, 16, 37, 576, 1537, 3100})
      for (int64_t outputs : {1, 5, 33, 70})
        for (int type : {0, 1, 2})
          for (bool is_biased : {false, true}) {
            if (rows * inputs * outputs > 4000000) continue;
            const Values x = random_values(rows * inputs), bias = random_values(outputs);
            const Values columns = columns_of(x, rows, inputs);
            const Typed weight = typed(random_values(outputs * inputs), type);
            const float scale = std::sqrt(float(inputs));
            comparison.add(
                rows * outputs,
                [&](float* out) {
                  const float* added = is_biased ? bias.data() : nullptr;
                  in_two(Dense{product_of(x, columns, added, out, rows, inputs, outputs), weight.bytes.data(), type},
                         KERNEL(dense));
                  for (int64_t i = 0; i < rows * outputs; i++) out[i] /= scale;
                },
                [&](int64_t i) {
                  const int64_t row = i / outputs, o = i % outputs;
                  const double sum = dot(&x[row * inputs], &weight.exact[o * inputs], inputs);
                  return (sum + (is_biased ? bias[o] : 0.0)) / scale;
                });
          }
}

void check_quantized() {
  Comparison comparison("quantized");
  for (int bits : {4, 8})
    for (int group : {32, 64, 128})
      for (int64_t rows : {1, 2, 3, 4, 7, 16, 193})
        for (int64_t groups : {1, 3, 9})
          for (int64_t outputs : {1, 5, 33, 70})
            for (int type : {0, 1, 2}) {
              const int64_t inputs = groups * group, words = inputs * bits / 32;
              const Values x = random_values(rows * inputs), columns = columns_of(x, rows, inputs);
              std::vector<uint32_t> packed(outputs * words);
              for (uint32_t& word : packed) word = generator();
              Values spread;
              if (rows <= Quantized::FEW) {
                Spread task{x.data(), nullptr, rows, inputs, LANES, bits, group};
                spread.resize(rows * task.size());
                task.out = spread.data();
                in_two(task, KERNEL(spread));
              }
              const Typed scales = typed(random_values(outputs * groups), type);
              const Typed biases = typed(random_values(outputs * groups), type);
              Values weight(outputs * inputs);
              for (int64_t i = 0; i < outputs * inputs; i++) {
                const uint32_t code = packed[i * bits / 32] >> i * bits % 32 & ((1u << bits) - 1);
                weight[i] = scales.exact[i / group] * float(code) + biases.exact[i / group];
              }
              const float scale = std::sqrt(float(inputs)) * (1 << bits);
              comparison.add(
                  rows * outputs,
                  [&](float* out) {
                    in_two(Quantized{product_of(x, columns, nullptr, out, rows, inputs, outputs), packed.data(),
                                     scales.bytes.data(), biases.bytes.data(), bits, group, type, spread.data()},
                           KERNEL(quantized));
                    for (int64_t i = 0; i < rows * outputs; i++) out[i] /= scale;
                  },
                  [&](int64_t i) {
                    return dot(&x[i / outputs * inputs], &weight[i % outputs * inputs], inputs) / scale;
                  });
            }
}

void check_norm() {
  Comparison comparison("norm");
  for (int64_t rows : {1, 3})
    for (int64_t width : {1, 3, 4, 17, 64, 576, 1030}) {
      const Values x = random_values(rows * width), weight = random_values(width);
      comparison.add(
          rows * width,
          [&](float* out) { in_two(Norm{x.data(), weight.data(), out, rows, width, 1e-5f}, KERNEL(norm)); },
          [&](int64_t i) {
            const float* row = &x[i / width * width];
            return x[i] / std::sqrt(dot(row, row, width) / width + 1e-5) * weight[i % width];
          });
    }
}

void check_layer_norm() {
  Comparison comparison("layer norm");
  for (int64_t width : {1, 3, 17, 64, 1030})
    for (bool is_biased : {false, true}) {
      const Values x = random_values(3 * width), weight = random_values(width), bias = random_values(width);
      const LayerNorm task{x.data(), weight.data(), is_biased ? bias.data() : nullptr, nullptr, 3, width, 1e-5f};
      comparison.add(
          3 * width,
          [&](float* out) {
            LayerNorm own = task;
            own.out = out;
            in_two(own, KERNEL(layer_norm));
          },
          [&](int64_t i) {
            const float* row = &x[i / width * width];
            double mean = 0.0, squares = 0.0;
            for (int64_t n = 0; n < width; n++) mean += row[n] / double(width);
            for (int64_t n = 0; n < width; n++) squares += (row[n] - mean) * (row[n] - mean);
            const double own = (x[i] - mean) / std::sqrt(squares / width + 1e-5) * weight[i % width];
            return own + (is_biased ? bias[i % width] : 0.0);
          });
    }
}

void check_gelu() {
  Comparison comparison("gelu");
  for (int64_t size : {1, 3, 64, 1001}) {
    Values x = random_values(size);
    for (float& value : x) value *= 4.0f;
    comparison.add(size, [&](float* out) { in_two(Gelu{x.data(), out, size}, KERNEL(gelu)); },
                   [&](int64_t i) { return x[i] / 2 * (1.0 + std::erf(x[i] / std::sqrt(2.0))); });
  }
}

void check_swish() {
  Comparison comparison("swish");
  const float slope = 1.6f, cubic = 0.07f;
  for (int64_t size : {1, 3, 64, 1001}) {
    Values x = random_values(size);
    for (float& value : x) value *= 4.0f;
    comparison.add(size, [&](float* out) { in_two(Swish{x.data(), out, size, slope, cubic}, KERNEL(swish)); },
                   [&](int64_t i) {
                     const double own = x[i];
                     return own / (1.0 + std::exp(-own * (double(slope) + double(cubic) * own * own)));
                   });
  }
}

void check_gate() {
  Comparison comparison("gate");
  for (int64_t size : {1, 3, 64, 1001}) {
    Values gate = random_values(size), x = random_values(size);
    for (float& value : gate) value *= 20.0f;
    comparison.add(size, [&](float* out) { in_two(Gate{gate.data(), x.data(), out, size}, KERNEL(gate)); },
                   [&](int64_t i) { return gate[i] / (1.0 + std::exp(-double(gate[i]))) * x[i]; });
  }
}

void check_rotation() {
  Comparison comparison("rotation");
  const int64_t batch = 2, heads = 3, tokens = 5;
  for (int64_t dim : {2, 6, 64, 80})
    for (bool is_shared : {false, true}) {
      const int64_t half = dim / 2, angles = is_shared ? 0 : tokens * half;
      const Values x = random_values(batch * heads * tokens * dim);
      const Values turned = random_values((is_shared ? 1 : batch) * tokens * half);
      Values cosines, sines;
      for (size_t first = 0; first < turned.size(); first += half) {
        for (int64_t i = 0; i < half; i++) cosines.push_back(std::cos(turned[first + i]));
        for (int sign : {-1, 1})
          for (int64_t i = 0; i < half; i++) sines.push_back(sign * std::sin(turned[first + i]));
      }
      // As a projection has them: the heads of a token beside each other.
      const Rotation task{x.data(), cosines.data(), sines.data(), nullptr, batch, heads, tokens, dim,
                          {tokens * heads * dim, dim, heads * dim}, angles};
      comparison.add(
          x.size(),
          [&](float* out) {
            Rotation own = task;
            own.out = out;
            in_two(own, KERNEL(rotation));
          },
          [&](int64_t i) {
            const int64_t d = i % dim, token = i / dim % tokens, head = i / dim / tokens % heads;
            const int64_t b = i / dim / tokens / heads;
            const float* row = &x[b * task.strides[0] + head * task.strides[1] + token * task.strides[2]];
            const float angle = turned[(is_shared ? 0 : b * tokens * half) + token * half + d % half];
            const double one = row[d % half], other = row[half + d % half];
            return d < half ? one * std::cos(angle) - other * std::sin(angle)
                            : other * std::cos(angle) + one * std::sin(angle);
          });
    }
}

// Attention of a row to the first `seen` tokens: the mean of their values by the softmax of their scores.
std::vector<double> attended(const float* q, const float* keys, const float* values, const float* mask, float scale,
                             int64_t seen, int64_t dim, int64_t value_dim) {
  std::vector<double> weights, sums(value_dim);
  double most = -1e300, all = 0.0;
  for (int64_t t = 0; t < seen; t++) {
    weights.push_back(dot(q, keys + t * dim, dim) * scale + (mask ? mask[t] : 0.0f));
    most = std::max(most, weights.back());
  }
  for (int64_t t = 0; t < seen; t++) {
    all += weights[t] = std::exp(weights[t] - most);
    for (int64_t d = 0; d < value_dim; d++) sums[d] += weights[t] * values[t * value_dim + d];
  }
  for (double& sum : sums) sum /= all;
  return sums;
}

template <typename Task>
void compare(Comparison& comparison, Task task, Kernel<Task> kernel, const std::vector<double>& exact) {
  comparison.add(
      exact.size(),
      [&](float* out) {
        task.out = out;
        in_two(task, kernel);
      },
      [&](int64_t i) { return exact[i]; });
}

// Random keys or values of sequences and groups, as a cache has them, and in float32. They are quantized here.
struct Cached {
  std::vector<uint32_t> words;
  Values scales, biases, exact;
  Stored stored;

  Cached(int64_t batch, int64_t groups, int64_t tokens, int64_t dim, int bits, int group)
      : exact(random_values(batch * groups * tokens * dim)), stored{bits, group, {}, {}, {}} {
    const auto part = [&](const void* data, int64_t width) {
      return Stored::Part{data, {groups * tokens * width, tokens * width}};
    };
    if (bits == 32) {
      stored.values = part(exact.data(), dim);
      return;
    }
    const int64_t count = exact.size() / group;
    words.resize(exact.size() * bits / 32), scales.resize(count), biases.resize(count);
    in_two(Quantization{exact.data(), words.data(), scales.data(), biases.data(), count, bits, group}, KERNEL(quantize));
    for (size_t i = 0; i < exact.size(); i++)
      exact[i] = scales[i / group] * float(words[i * bits / 32] >> i * bits % 32 & ((1u << bits) - 1)) + biases[i / group];
    stored.values = part(words.data(), dim * bits / 32);
    stored.scales = part(scales.data(), dim / group), stored.biases = part(biases.data(), dim / group);
  }
};

void check_quantize() {
  Comparison comparison("quantize");
  for (int bits : {4, 8})
    for (int group : {32, 64, 128})
      for (float shift : {-5.0f, 0.0f, 5.0f}) {
        const int64_t groups = 7;
        Values x = random_values(groups * group), scales(groups), biases(groups);
        for (float& value : x) value += shift;
        std::fill_n(x.begin(), group, 0.0f);
        std::vector<uint32_t> words(x.size() * bits / 32);
        const Quantization task{x.data(), words.data(), scales.data(), biases.data(), groups, bits, group};
        in_two(task, KERNEL(quantize));
        for (int64_t n = 0; n < groups; n++) {  // no value is farther than a step from its own
          const double step = std::max(std::fabs(double(scales[n])), 1e-7);
          comparison.add(
              group,
              [&](float* out) {
                for (int64_t i = 0; i < group; i++) {
                  const int64_t at = n * group + i;
                  const uint32_t code = words[at * bits / 32] >> at * bits % 32 & ((1u << bits) - 1);
                  const double own = double(scales[n]) * code + biases[n];
                  out[i] = float(std::max(0.0, std::fabs(own - x[at]) / step - 1.01));
                }
              },
              [&](int64_t) { return 0.0; });
        }
      }
}

void check_attention(Comparison& comparison, int64_t heads, int64_t length, int64_t tokens, int64_t dim, bool is_masked,
                     bool is_causal, int bits = 32, int group = 0) {
  const int64_t batch = 2, groups = 2, rows = heads * length, all = batch * groups;
  const int64_t value_dim = bits == 32 ? dim + 5 : dim + group;
  const Cached held_keys(batch, groups, tokens, dim, bits, group), held(batch, groups, tokens, value_dim, bits, group);
  const Values q = random_values(all * rows * dim), &keys = held_keys.exact, &values = held.exact;
  const Values mask = random_values(batch * length * tokens);
  Attention task{q.data(), held_keys.stored, held.stored, is_masked ? mask.data() : nullptr, nullptr, nullptr,
                 batch, groups, rows, tokens, dim, value_dim, length * tokens, length, 0.3f, is_causal};
  Values partial(all * task.segments() * rows * task.partial_width());
  if (task.segments() > 1) task.partial = partial.data();
  std::vector<double> exact;
  for (int64_t row = 0; row < all * rows; row++) {
    const int64_t group = row / rows, own = row % length, seen = is_causal ? tokens - length + own + 1 : tokens;
    const float* addends = is_masked ? &mask[(group / groups * length + own) * tokens] : nullptr;
    const auto sums = attended(&q[row * dim], &keys[group * tokens * dim], &values[group * tokens * value_dim], addends,
                               0.3f, seen, dim, value_dim);
    exact.insert(exact.end(), sums.begin(), sums.end());
  }
  comparison.add(
      exact.size(),
      [&](float* out) {
        task.out = out;
        in_two(task, KERNEL(attention));
        if (task.partial) in_two(SegmentedAttention{task}, KERNEL(combine));
      },
      [&](int64_t i) { return exact[i]; });
}

void check_attention() {
  Comparison comparison("attention");
  for (int64_t heads : {1, 3})
    for (int64_t length : {1, 5, 17})
      for (int64_t tokens : {17, 100, 512, 1100})
        for (int64_t dim : {19, 64})
          for (bool is_masked : {false, true})
            for (bool is_causal : {false, true})
              check_attention(comparison, heads, length, tokens, dim, is_masked, is_causal);
}

void check_quantized_attention() {
  Comparison comparison("to quants");
  for (int bits : {4, 8})
    for (int group : {32, 64, 128})
      for (int64_t heads : {1, 3})
        for (int64_t length : {1, 9})
          for (int64_t tokens : {17, 64, 1100})
            check_attention(comparison, heads, length, tokens, 128, length > 1, length == 1, bits, group);
}

void check_block_attention(Comparison& comparison, int64_t length, int64_t tokens, int64_t dim, int64_t value_dim,
                           bool is_masked, bool is_causal) {
  const int64_t batch = 2, heads = 6, groups = 3;
  const Values q = random_values(batch * heads * length * dim), keys = random_values(batch * groups * tokens * dim);
  const Values values = random_values(batch * groups * tokens * value_dim), mask = random_values(length * tokens);
  const BlockAttention task{q.data(), keys.data(), values.data(), is_masked ? mask.data() : nullptr, nullptr,
                            batch, heads, groups, length, tokens, dim, value_dim,
                            {heads * length * dim, length * dim, dim}, {groups * tokens * dim, tokens * dim, dim},
                            {groups * tokens * value_dim, tokens * value_dim, value_dim}, {0, 0, tokens},
                            0.3f, is_causal};
  std::vector<double> exact(batch * length * heads * value_dim);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t head = 0; head < heads; head++)
      for (int64_t row = 0; row < length; row++) {
        const int64_t group = b * groups + head / (heads / groups);
        const int64_t seen = is_causal ? tokens - length + row + 1 : tokens;
        const auto sums = attended(&q[((b * heads + head) * length + row) * dim], &keys[group * tokens * dim],
                                   &values[group * tokens * value_dim], is_masked ? &mask[row * tokens] : nullptr, 0.3f,
                                   seen, dim, value_dim);
        std::copy(sums.begin(), sums.end(), &exact[((b * length + row) * heads + head) * value_dim]);
      }
  compare(comparison, task, KERNEL(block_attention), exact);
}

void check_block_attention() {
  Comparison comparison("in blocks");
  for (int64_t length : {1, 17, 97})
    for (int64_t tokens : {97, 300})
      for (int64_t dim : {20, 64})
        for (bool is_masked : {false, true})
          for (bool is_causal : {false, true})
            check_block_attention(comparison, length, tokens, dim, dim + 8, is_masked, is_causal);
}

// Settings of a row of a draw, and the least weight that they keep of weights in descending order.
struct Filter {
  float inverse_temperature, top_p, min_p, top_k;

  double least(const std::vector<double>& descending) const {
    const double all = std::accumulate(descending.begin(), descending.end(), 0.0);
    double before = 0.0, kept = descending[0];
    for (size_t n = 0; n < descending.size() && (top_p >= 1 || before < top_p * all) && n < top_k; n++) {
      kept = descending[n];
      before += descending[n];
    }
    return std::max(kept, double(min_p));
  }
};

// The token that a row draws; -1 where rounding decides.
int64_t drawn(const float* logits, int64_t vocab, const Filter& filter, double uniform) {
  const int64_t best = std::max_element(logits, logits + vocab) - logits;
  if (filter.inverse_temperature == 0) return best;
  std::vector<double> weights;
  for (int64_t i = 0; i < vocab; i++)
    weights.push_back(std::exp((logits[i] - logits[best]) * double(filter.inverse_temperature)));
  std::vector<double> descending = weights;
  std::sort(descending.begin(), descending.end(), std::greater<>());
  const double least = filter.least(descending);
  double all = 0.0, before = 0.0;
  for (double weight : weights)
    if (weight != least && std::fabs(weight - least) < 1e-6 * least) return -1;
  for (double& weight : weights) all += weight *= weight >= least;
  int64_t token = -1;
  for (int64_t i = 0; i < vocab; i++) {
    if (weights[i] > 0.0 && std::fabs(before / all - uniform) < 1e-6) return -1;
    before += weights[i];
    if (token < 0 && before > uniform * all) token = i;
  }
  return token;
}

void check_draw(Comparison& comparison, const Values& logits, const Filter& filter) {
  std::uniform_real_distribution<float> uniform(0.001f, 0.999f);
  const int64_t vocab = logits.size() / 2;
  const float top_k = std::min(filter.top_k, float(vocab));
  Values uniforms{uniform(generator), uniform(generator)}, settings;
  for (int row : {0, 1})
    settings.insert(settings.end(), {filter.inverse_temperature, filter.top_p, filter.min_p, top_k});
  std::vector<uint32_t> tokens(2);
  Draw task{logits.data(), settings.data(), uniforms.data(), nullptr, tokens.data(), 2, vocab};
  Values weights(2 * task.space());
  task.weights = weights.data();
  in_two(task, KERNEL(draw));
  comparison.add(2, [&](float* out) { std::copy(tokens.begin(), tokens.end(), out); },
                 [&](int64_t i) {
                   const int64_t token = drawn(&logits[i * vocab], vocab, filter, uniforms[i]);
                   return token < 0 ? tokens[i] : token;
                 });
}

void check_draw() {
  Comparison comparison("draw");
  const float all = 1e6f;
  for (int64_t vocab : {1, 3, 64, 1000, 40001})
    for (float scale : {0.0f, 0.01f, 2.0f, 20.0f}) {
      Values logits = random_values(2 * vocab);
      for (float& value : logits) value *= scale;
      for (const Filter& filter : {Filter{0, 1, 0, all}, Filter{1, 1, 0, all}, Filter{0.7f, 0.9f, 0, all},
                                   Filter{1, 0.999f, 0, all}, Filter{1.3f, 1, 0, 20}, Filter{1, 1, 0.1f, all},
                                   Filter{1, 0.8f, 0.01f, 300}})
        check_draw(comparison, logits, filter);
    }
}

void check_penalty() {
  Comparison comparison("penalty");
  for (int64_t vocab : {1, 7, 17, 300, 1001}) {
    const Values x = random_values(2 * vocab), penalties = random_values(6);
    Values generated;
    std::vector<uint8_t> prompted;
    for (int64_t i = 0; i < 2 * vocab; i++) {
      generated.push_back(generator() % 3);
      prompted.push_back(generator() % 2);
    }
    comparison.add(
        2 * vocab,
        [&](float* out) {
          const Penalty task{x.data(), generated.data(), prompted.data(), penalties.data(), out, 2, vocab};
          in_two(task, KERNEL(penalty));
        },
        [&](int64_t i) {
          const float* own = &penalties[i / vocab * 3];
          const double repeated = x[i] > 0 ? double(x[i]) / own[2] : double(x[i]) * own[2];
          const double kept = generated[i] || prompted[i] ? repeated : x[i];
          return kept - generated[i] * own[0] - (generated[i] > 0) * own[1];
        });
  }
}

void check_mask() {
  Comparison comparison("mask");
  for (int64_t vocab : {1, 7, 17, 300, 1001}) {
    const int64_t bytes = (vocab + 7) / 8;
    const Values x = random_values(2 * vocab);
    std::vector<uint8_t> allowed;
    for (int64_t i = 0; i < 2 * bytes; i++) allowed.push_back(generator());
    comparison.add(
        2 * vocab,
        [&](float* out) {
          in_two(Mask{x.data(), allowed.data(), out, 2, vocab, bytes}, KERNEL(mask));
          for (int64_t i = 0; i < 2 * vocab; i++) out[i] = std::max(out[i], -1000.0f);
        },
        [&](int64_t i) {
          return allowed[i / vocab * bytes + i % vocab / 8] >> i % vocab % 8 & 1 ? x[i] : -1000.0;
        });
  }
}

void check_top() {
  Comparison comparison("top");
  for (int64_t width : {1, 7, 300, 1001})
    for (int64_t count : {1, 5, 64}) {
      if (count > width) continue;
      Values x = random_values(2 * width);
      for (float& value : x) value = std::round(4.0f * value);  // so that some are equal
      std::vector<uint32_t> found(2 * count), exact;
      in_two(Top{x.data(), found.data(), 2, width, count}, KERNEL(top));
      for (const float* row : {&x[0], &x[width]}) {
        std::vector<uint32_t> order(width);
        std::iota(order.begin(), order.end(), 0u);
        std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return row[a] > row[b]; });
        exact.insert(exact.end(), order.begin(), order.begin() + count);
      }
      comparison.add(2 * count, [&](float* out) { std::copy(found.begin(), found.end(), out); },
                     [&](int64_t i) { return exact[i]; });
    }
}

void check_log_sum() {
  Comparison comparison("log sum");
  for (int64_t width : {1, 7, 300, 10001}) {
    const Values x = random_values(2 * width);
    comparison.add(2, [&](float* out) { in_two(LogSum{x.data(), out, 2, width}, KERNEL(log_sum)); },
                   [&](int64_t i) {
                     double sum = 0.0;
                     for (int64_t n = 0; n < width; n++) sum += std::exp(double(x[i * width + n]));
                     return std::log(sum);
                   });
  }
}

void check_gates() {
  Comparison comparison("gates");
  for (Rule rule : {Rule::MAMBA, Rule::DELTA, Rule::BOUNDED_DELTA})
    for (int64_t heads : {1, 3, 21})
      for (int64_t width : {1, 20}) {
        if (rule == Rule::MAMBA && width > 1) continue;
        const int64_t tokens = 3, size = tokens * heads * width;
        const float least = rule == Rule::BOUNDED_DELTA ? -5.0f : 0.1f, most = 2.0f;
        const Values decays = random_values(size), factors = random_values(tokens * heads);
        const Values rates = random_values(heads), biases = random_values(heads * width);
        auto step = [&](int64_t i) {
          const double step = std::log1p(std::exp(double(decays[i]) + biases[i % (heads * width)]));
          return rule == Rule::MAMBA ? std::min(std::max(step, double(least)), double(most)) : step;
        };
        auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
        comparison.add(
            size + tokens * heads,
            [&](float* out) {
              in_two(Gates{decays.data(), factors.data(), rates.data(), biases.data(), out, out + size, tokens, heads,
                           width, rule, least, most},
                     KERNEL(gates));
            },
            [&](int64_t i) {
              if (i >= size) return rule == Rule::MAMBA ? step(i - size) : most * sigmoid(factors[i - size]);
              const double rate = std::exp(double(rates[i / width % heads]));
              if (rule != Rule::BOUNDED_DELTA) return std::exp(-rate * step(i));
              return std::exp(least * sigmoid(rate * (double(decays[i]) + biases[i % (heads * width)])));
            });
      }
}

// Two sequences, with a mask or without, and with a state before them or without.
void check_recurrence(Rule rule, bool is_per_key, int64_t tokens, int64_t dim, int64_t key_dim, bool has_all,
                      Comparison& comparison) {
  const int64_t batch = 2, heads = 4, groups = 2;
  const int64_t size = batch * tokens * heads * dim, whole = batch * heads * dim * key_dim;
  const Values keys = random_values(batch * tokens * groups * key_dim), queries = random_values(keys.size());
  const Values values = random_values(size), weights = random_values(heads), before = random_values(whole);
  const Values factors(batch * tokens * heads, 0.02f);
  Values decays = random_values(batch * tokens * heads * (is_per_key ? key_dim : 1));
  for (float& decay : decays) decay = 1.0f / (1.0f + decay * decay);
  std::vector<char> mask(batch * tokens);
  for (char& is_kept : mask) is_kept = generator() % 4 > 0;
  Recurrence task{keys.data(), queries.data(), values.data(), decays.data(), factors.data(),
                  rule == Rule::MAMBA ? weights.data() : nullptr, has_all ? before.data() : nullptr,
                  has_all ? reinterpret_cast<const bool*>(mask.data()) : nullptr, nullptr, nullptr,
                  batch, tokens, heads, groups, dim, key_dim, {}, {}, {}, rule, is_per_key};
  for (auto* strides : {task.key_strides, task.query_strides})
    strides[2] = key_dim, strides[1] = groups * key_dim, strides[0] = tokens * strides[1];
  task.value_strides[2] = dim, task.value_strides[1] = heads * dim, task.value_strides[0] = tokens * heads * dim;

  std::vector<double> exact(size + whole);
  for (int64_t i = 0; i < whole; i++) exact[size + i] = has_all ? before[i] : 0.0;
  for (int64_t row = 0; row < batch * heads * dim; row++)
    for (int64_t token = 0; token < tokens; token++) {
      const int64_t head = row / dim % heads, n = row / dim / heads * tokens + token, at = n * heads + head;
      const int64_t place = (n * groups + head / (heads / groups)) * key_dim;
      double *state = &exact[size + row * key_dim], known = 0.0, found = 0.0;
      const double value = values[at * dim + row % dim];
      if (has_all && !mask[n]) continue;
      for (int64_t d = 0; d < key_dim; d++) {
        state[d] *= decays[is_per_key ? at * key_dim + d : at];
        known += rule == Rule::MAMBA ? 0.0 : state[d] * keys[place + d];
      }
      for (int64_t d = 0; d < key_dim; d++) {
        state[d] += (value - known) * factors[at] * keys[place + d];
        found += state[d] * queries[place + d];
      }
      exact[at * dim + row % dim] = found + (rule == Rule::MAMBA ? value * weights[head] : 0.0);
    }
  comparison.add(
      size + whole,
      [&](float* out) {
        Recurrence own = task;
        own.out = out, own.state_out = out + size;
        in_two(own, KERNEL(recurrence));
      },
      [&](int64_t i) { return exact[i]; });
}

void check_recurrences() {
  Comparison comparison("recurrence");
  for (Rule rule : {Rule::MAMBA, Rule::DELTA})
    for (int64_t tokens : {1, 2, 9})
      for (int64_t dim : {3, 32, 37, 64})
        for (int64_t key_dim : {4, 16, 20, 128})
          for (bool has_all : {false, true}) {
            check_recurrence(rule, false, tokens, dim, key_dim, has_all, comparison);
            if (rule == Rule::DELTA) check_recurrence(rule, true, tokens, dim, key_dim, has_all, comparison);
          }
}

int main() {
  check_dense();
  check_quantized();
  check_norm();
  check_layer_norm();
  check_gelu();
  check_swish();
  check_gate();
  check_rotation();
  check_attention();
  check_quantize();
  check_quantized_attention();
  check_block_attention();
  check_draw();
  check_penalty();
  check_mask();
  check_top();
  check_log_sum();
  check_gates();
  check_recurrences();
  return failures > 0;
}
