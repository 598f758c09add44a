// Operations of a decoder layer: what leads to its attention, the writing of keys and values, and the rest.
#pragma once
#include "product_tasks.h"
#include "stored.h"

#include <cstring>

namespace {

using Arrays = std::vector<mx::array>;
using Encoder = mx::cpu::CommandEncoder;

// Sizes of a layer's attention, and of the rows that it computes.
struct Sizes {
  int64_t heads, groups, dim, batch, length;
  StoredFormat format;  // of keys and values

  int64_t rows() const { return batch * length; }
  int64_t query() const { return heads * dim; }
  int64_t key() const { return groups * dim; }
  // Of what leads to the attention: queries [batch, heads, length, dim], keys [batch, groups, length, dim] and values
  // [batch, length, groups, dim], one behind the other; if they are quantized, then the words of keys and of values, their
  // scales and their biases.
  int64_t keys_at() const { return rows() * query(); }
  int64_t values_at() const { return keys_at() + rows() * key(); }
  int64_t width(int64_t part) const { return part ? dim / format.group : dim * format.bits / 32; }
  int64_t part_at(int64_t part, bool is_value) const {
    int64_t at = format.is_quantized() ? values_at() + rows() * key() : keys_at();
    for (int64_t n = 0; n < part; n++) at += 2 * rows() * groups * width(n);
    return is_value ? at + rows() * groups * width(part) : at;
  }
  int64_t size() const { return part_at(format.arrays(), false); }
};

// A linear layer: bits of its weights, 0 if they are floats; their group; whether it has a bias; and its arrays.
using Layer = std::tuple<int, int, bool, Arrays>;

// Where a linear layer's arrays are among the inputs of an operation.
struct Linear {
  int bits, group, outputs;
  bool is_biased;
  size_t at;

  // Its arrays are added to the inputs. width: of its own inputs.
  Linear(const Layer& layer, int width, Arrays& inputs)
      : bits(std::get<0>(layer)), group(std::get<1>(layer)), is_biased(std::get<2>(layer)), at(inputs.size()) {
    const Arrays& own = std::get<3>(layer);
    check(own.size() == (bits ? 3u : 1u) + is_biased && own[0].ndim() == 2);
    outputs = own[0].shape(0);
    if (bits) check_format(own[0], own[1], own[2], group, bits);
    check(bits ? fits(own[0], own[1], own[2], width, group, bits)
               : is_float(own[0].dtype()) && own[0].shape(1) == width);
    check(!is_biased || own.back().shape() == mx::Shape{outputs});
    for (size_t n = 0; n < own.size(); n++) {
      const bool is_bias = is_biased && n + 1 == own.size();
      inputs.push_back(in_order(is_bias ? mx::astype(own[n], mx::float32, cpu()) : own[n]));
    }
  }

  AnyProduct task(const Arrays& inputs, const float* x, float* out, int64_t rows, int64_t width) const {
    Product product{x, nullptr, nullptr, out, rows, width, outputs};
    const size_t arrays = bits ? 3 : 1;
    if (is_biased) product.bias = inputs[at + arrays].data<float>();
    if (!bits) return AnyProduct(Dense{product, inputs[at].data<void>(), type_of(inputs[at])});
    return AnyProduct(Quantized{product, inputs[at].data<uint32_t>(), inputs[at + 1].data<void>(),
                                inputs[at + 2].data<void>(), bits, group, type_of(inputs[at + 1])});
  }
};

class PureOperation : public mx::UnaryPrimitive {
 public:
  PureOperation() : mx::UnaryPrimitive(cpu()) {}
  bool is_equivalent(const mx::Primitive& other) const override { return this == &other; }
  void eval_gpu(const Arrays&, mx::array&) override { throw std::runtime_error("this operation is for a CPU"); }
};

// Queries, keys and values of a layer, normed and turned: x [batch, length, width] -> [Sizes::size()].
class AttentionInputs : public PureOperation {
 public:
  AttentionInputs(const Sizes& sizes, float eps, std::vector<Linear> layers, bool has_norms, const Level& level)
      : sizes_(sizes), eps_(eps), layers_(std::move(layers)), has_norms_(has_norms), level_(level) {}
  const char* name() const override { return "NativeAttentionInputs"; }

  // inputs: x, cosines, sines, the norm of x, those of queries and keys if there are some; the layers' arrays.
  void eval_cpu(const Arrays& inputs, mx::array& out) override {
    allocate(out);
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const Sizes& s = sizes_;
    const mx::array x = in_rows(inputs[0], encoder), cosines = in_rows(inputs[1], encoder);
    const mx::array sines = in_rows(inputs[2], encoder);
    const int64_t width = x.shape(-1), rows = s.rows();
    float* normed = room<float>(rows * width, encoder);
    float* flat = room<float>(rows * (s.query() + s.key()), encoder);  // queries and keys, token by token
    float* to[3] = {flat, flat + rows * s.query(), out.data<float>() + s.values_at()};
    const Norm norm{x.data<float>(), inputs[3].data<float>(), normed, rows, width, eps_};
    std::vector<AnyProduct> products;
    for (int n = 0; n < 3; n++) products.push_back(layers_[n].task(inputs, normed, to[n], rows, width));
    const Arranging arranging(level_);
    float* arranged = room<float>(room_of(products, arranging), encoder);
    const int64_t angles = cosines.shape(0) > 1 ? s.length * s.dim / 2 : 0;
    std::vector<Norm> norms;
    std::vector<Rotation> rotations;
    for (int n = 0; n < 2; n++) {
      const int64_t heads = n ? s.groups : s.heads;
      if (has_norms_) norms.push_back({to[n], inputs[4 + n].data<float>(), to[n], rows * heads, s.dim, eps_});
      rotations.push_back({to[n], cosines.data<float>(), sines.data<float>(),
                           out.data<float>() + (n ? s.keys_at() : 0), s.batch, heads, s.length, s.dim,
                           {s.length * heads * s.dim, s.dim, heads * s.dim}, angles});
    }
    const auto part = [&](int64_t n) { return out.data<float>() + s.part_at(n, false); };
    Quantization quantization{};
    if (s.format.is_quantized())
      quantization = {out.data<float>() + s.keys_at(), reinterpret_cast<uint32_t*>(part(0)), part(1), part(2),
                      2 * s.rows() * s.key() / s.format.group, s.format.bits, s.format.group};
    encoder.dispatch([=, level = level_]() mutable {
      compute(norm, level.norm);
      compute_products(products, arranging, arranged, level);
      for (const Norm& own : norms) compute(own, level.norm);
      for (const Rotation& own : rotations) compute(own, level.rotation);
      if (quantization.groups) compute(quantization, level.quantize);
    });
  }

 private:
  Sizes sizes_;
  float eps_;
  std::vector<Linear> layers_;
  bool has_norms_;
  Level level_;
};

// An array of a class's slots, [slots, groups, capacity, width], with what belongs to its rows behind their offsets.
class SlotWrite : public PureOperation {
 public:
  SlotWrite(const Sizes& sizes, int64_t part, int64_t first, int64_t batch, bool is_value)
      : sizes_(sizes), part_(part), first_(first), batch_(batch), is_value_(is_value) {}
  const char* name() const override { return "NativeSlotWrite"; }

  // inputs: slots, what AttentionInputs has, offsets.
  void eval_cpu(const Arrays& inputs, mx::array& out) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const mx::array& slots = inputs[0];
    const float* before = nullptr;
    if (slots.is_donatable() && slots.flags().row_contiguous) out.copy_shared_buffer(slots);
    else {
      allocate(out);
      before = in_rows(slots, encoder).data<float>();
    }
    const int64_t capacity = slots.shape(2), count = slots.size();
    const float* from = inputs[1].data<float>() + sizes_.part_at(part_, is_value_);
    encoder.dispatch([=, s = sizes_, width = sizes_.width(part_), first = first_, batch = batch_, is_value = is_value_,
                      to = out.data<float>(), offsets = inputs[2].data<int32_t>()] {
      if (before) std::memcpy(to, before, count * sizeof(float));
      for (int64_t b = 0; b < batch; b++)
        for (int64_t g = 0; g < s.groups; g++)
          for (int64_t n = 0; n < s.length; n++) {
            const int64_t row = first + b, at = offsets[b] + n;
            const int64_t own = is_value ? (row * s.length + n) * s.groups + g : (row * s.groups + g) * s.length + n;
            if (at < capacity)
              std::memcpy(to + ((b * s.groups + g) * capacity + at) * width, from + own * width, width * sizeof(float));
          }
    });
  }

 private:
  Sizes sizes_;
  int64_t part_, first_, batch_;
  bool is_value_;
};

// The rest of a layer, from its attention on: [batch, length, width].
class AttentionAndRest : public PureOperation {
 public:
  AttentionAndRest(const Sizes& sizes, float scale, float eps, std::vector<Linear> layers, std::vector<int> batches,
                   const Level& level)
      : sizes_(sizes), scale_(scale), eps_(eps), layers_(std::move(layers)), batches_(std::move(batches)),
        level_(level) {}
  const char* name() const override { return "NativeDecoderLayer"; }

  // inputs: x, what AttentionInputs has, the norm; the layers' arrays; keys, values and offsets of each class.
  void eval_cpu(const Arrays& inputs, mx::array& out) override {
    allocate(out);
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const Sizes& s = sizes_;
    const mx::array x = in_rows(inputs[0], encoder);
    const int64_t width = x.shape(-1), rows = s.rows(), hidden = layers_[1].outputs;
    float* attended = room<float>(rows * s.query(), encoder);
    float* by_token = s.length > 1 ? room<float>(rows * s.query(), encoder) : attended;
    float *projected = room<float>(rows * width, encoder), *sum = room<float>(rows * width, encoder);
    float *normed = room<float>(rows * width, encoder), *gated = room<float>(rows * hidden, encoder);
    float *opened = room<float>(rows * hidden, encoder), *raised = room<float>(rows * hidden, encoder);
    const std::vector<Attention> attentions = this->attentions(inputs, attended, encoder);
    std::vector<AnyProduct> output{layers_[0].task(inputs, by_token, projected, rows, s.query())};
    std::vector<AnyProduct> up{layers_[1].task(inputs, normed, opened, rows, width),
                               layers_[2].task(inputs, normed, raised, rows, width)};
    std::vector<AnyProduct> down{layers_[3].task(inputs, gated, projected, rows, hidden)};
    const Arranging arranging(level_);
    int64_t most = 0;
    for (const auto* own : {&output, &up, &down}) most = std::max(most, room_of(*own, arranging));
    float* arranged = room<float>(most, encoder);
    const Norm norm{sum, inputs[2].data<float>(), normed, rows, width, eps_};
    const Gate gate{opened, raised, gated, rows * hidden};
    const Sum between{x.data<float>(), projected, sum, rows * width}, last{sum, projected, out.data<float>(), rows * width};
    encoder.dispatch([=, s = sizes_, level = level_]() mutable {
      for (const Attention& own : attentions) compute_attention(own, level.attention, level.combine);
      if (s.length > 1) turn(s, attended, by_token);
      compute_products(output, arranging, arranged, level);
      compute(between, level.sum);
      compute(norm, level.norm);
      compute_products(up, arranging, arranged, level);
      compute(gate, level.gate);
      compute_products(down, arranging, arranged, level);
      compute(last, level.sum);
    });
  }

 private:
  // [batch, heads, length, dim] -> [batch, length, heads, dim].
  static void turn(const Sizes& s, const float* from, float* to) noexcept {
    for (int64_t b = 0; b < s.batch; b++)
      for (int64_t h = 0; h < s.heads; h++)
        for (int64_t n = 0; n < s.length; n++, from += s.dim)
          std::memcpy(to + ((b * s.length + n) * s.heads + h) * s.dim, from, s.dim * sizeof(float));
  }

  std::vector<Attention> attentions(const Arrays& inputs, float* out, Encoder& encoder) const {
    const Sizes& s = sizes_;
    std::vector<Attention> all;
    const size_t each = s.format.arrays(), all_of_class = 2 * each + 1;
    const mx::array* own = &inputs[inputs.size() - all_of_class * batches_.size()];
    int64_t done = 0;
    for (size_t n = 0; n < batches_.size(); done += batches_[n], n++, own += all_of_class) {
      const int64_t rows = s.heads / s.groups * s.length, start = done * s.heads * s.length * s.dim;
      Attention task{inputs[1].data<float>() + start, stored(s.format, own, encoder),
                     stored(s.format, own + each, encoder), nullptr, nullptr, out + start, batches_[n], s.groups, rows,
                     own->shape(2), s.dim, s.dim, 0, s.length, scale_, true, own[2 * each].data<int32_t>()};
      make_room(task, encoder);
      all.push_back(task);
    }
    return all;
  }

  Sizes sizes_;
  float scale_, eps_;
  std::vector<Linear> layers_;
  std::vector<int> batches_;
  Level level_;
};

}  // namespace
