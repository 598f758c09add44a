// A decoder layer of a step, of the form that Llama and Qwen share, in few operations: what leads to its attention, the
// writing of keys and values, and the rest. A step of one sequence has some nine hundred small operations otherwise, and
// MLX spends on them a third of its time.
#include "product_tasks.h"
#include "stored.h"

#include <nanobind/stl/vector.h>

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
      for (const Attention& own : attentions) {
        compute(own, level.attention);
        if (own.partial) compute(SegmentedAttention{own}, level.combine);
      }
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
      const int64_t size = task.batch * task.groups * task.segments() * rows * task.partial_width();
      if (task.segments() > 1) task.partial = room<float>(size, encoder);
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

using Slots = std::tuple<StoredArrays, StoredArrays, mx::array, int>;

// A layer of a step. x [batch, length, width]; layers: those of queries, keys, values and the output, gate, up and down;
// norms: that of the attention's input, of the rest's, of queries and of keys if there are some; slots: keys, values,
// offsets and number of rows of each class. Returns the layer's output, and the keys and values of each class.
std::tuple<mx::array, std::vector<StoredArrays>, std::vector<StoredArrays>> decoder_layer(
    const mx::array& x, const std::vector<Layer>& layers, const Arrays& norms, const mx::array& cosines,
    const mx::array& sines, const std::vector<Slots>& slots, int heads, int groups, int dim, float scale, float eps,
    const std::string& name) {
  const Level level = ::level(name);
  check(x.dtype() == mx::float32 && x.ndim() == 3 && layers.size() == 7 && (norms.size() == 2 || norms.size() == 4));
  check(!slots.empty());
  const StoredFormat format(arrays_of(std::get<0>(slots[0])), dim);
  const Sizes sizes{heads, groups, dim, x.shape(0), x.shape(1), format};
  int rows = 0;
  for (const auto& [own_keys, own_values, offsets, count] : slots) {
    const Arrays keys = arrays_of(own_keys), values = arrays_of(own_values);
    check(StoredFormat(keys, dim) == format && StoredFormat(values, dim) == format &&
          keys[0].shape() == values[0].shape() && keys[0].shape(1) == groups && offsets.dtype() == mx::int32 &&
          offsets.size() >= size_t(count) && count <= keys[0].shape(0));
    rows += count;
  }
  check(rows && rows == x.shape(0) && x.shape(1) && heads % groups == 0 && dim % 2 == 0);
  const int width = x.shape(2), angles = sizes.length * dim / 2;
  for (size_t n = 0; n < norms.size(); n++)
    check(norms[n].dtype() == mx::float32 && norms[n].shape() == mx::Shape{n < 2 ? width : dim});
  check(cosines.dtype() == mx::float32 && sines.dtype() == mx::float32 && cosines.ndim() && sines.ndim() &&
        (cosines.shape(0) == 1 || cosines.shape(0) == rows) && cosines.shape(0) == sines.shape(0) &&
        cosines.size() == size_t(cosines.shape(0)) * angles && sines.size() == 2 * cosines.size());

  Arrays inputs{x, cosines, sines, in_order(norms[0])};
  for (size_t n = 2; n < norms.size(); n++) inputs.push_back(in_order(norms[n]));
  std::vector<Linear> own;
  for (int n = 0; n < 3; n++) own.emplace_back(layers[n], width, inputs);
  check(own[0].outputs == sizes.query() && own[1].outputs == sizes.key() && own[2].outputs == sizes.key());
  const mx::array attended({int(sizes.size())}, mx::float32,
                           std::make_shared<AttentionInputs>(sizes, eps, own, norms.size() > 2, level), inputs);

  Arrays rest{x, attended, in_order(norms[1])};
  own.clear();
  own.emplace_back(layers[3], int(sizes.query()), rest);
  for (int n = 4; n < 6; n++) own.emplace_back(layers[n], width, rest);
  own.emplace_back(layers[6], own[1].outputs, rest);
  check(own[0].outputs == width && own[1].outputs == own[2].outputs && own[3].outputs == width);
  std::vector<int> batches;
  std::vector<StoredArrays> keys, values;
  for (const auto& [own_keys, own_values, offsets, count] : slots) {
    const int64_t first = std::accumulate(batches.begin(), batches.end(), int64_t{0});
    for (const bool is_value : {false, true}) {
      Arrays written = arrays_of(is_value ? own_values : own_keys);
      for (size_t n = 0; n < written.size(); n++) {
        auto write = std::make_shared<SlotWrite>(sizes, n, first, count, is_value);
        const mx::array slots = written[n];
        written[n] = mx::array(slots.shape(), slots.dtype(), write, {slots, attended, offsets});
      }
      rest.insert(rest.end(), written.begin(), written.end());
      (is_value ? values : keys).push_back(stored_arrays(written));
    }
    rest.push_back(offsets);
    batches.push_back(count);
  }
  const mx::array out(x.shape(), mx::float32,
                      std::make_shared<AttentionAndRest>(sizes, scale, eps, own, batches, level), rest);
  return {out, keys, values};
}

}  // namespace

void add_decoder(nb::module_& m) {
  m.def("decoder_layer", &decoder_layer, nb::arg("x"), nb::arg("layers"), nb::arg("norms"), nb::arg("cosines"),
        nb::arg("sines"), nb::arg("slots"), nb::arg("heads"), nb::arg("groups"), nb::arg("dim"), nb::arg("scale"),
        nb::arg("eps"), nb::arg("level") = "");
}
