// Attention, and the format of the keys and values that it reads: scaled dot products of few queries, or of many.
#include "stored.h"

namespace {

using Arrays = std::vector<mx::array>;
using Encoder = mx::cpu::CommandEncoder;

class AttentionOperation : public Operation<Attention> {
 public:
  AttentionOperation(const StoredFormat& keys, const StoredFormat& values, float scale, bool is_causal,
                     const Level& level)
      : Operation(level.attention), keys_(keys), values_(values), scale_(scale), is_causal_(is_causal),
        combine_(level.combine) {}
  const char* name() const override { return "NativeAttention"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const AttentionOperation&>(other);
    return keys_ == same.keys_ && values_ == same.values_ && scale_ == same.scale_ &&
           is_causal_ == same.is_causal_ && kernel_ == same.kernel_;
  }

  void eval_cpu(const Arrays& inputs, mx::array& out) override {
    allocate(out);
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.dispatch([task = this->task(inputs, out, encoder), kernel = kernel_, combine = combine_] {
      compute_attention(task, kernel, combine);
    });
  }

 protected:
  Attention task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    const mx::array q = in_rows(inputs[0], encoder), &keys = inputs[1];
    const size_t values = 1 + keys_.arrays(), mask = values + values_.arrays();
    const int64_t batch = q.shape(0), groups = keys.shape(1), length = q.shape(2);
    const int64_t rows = q.shape(1) / groups * length, tokens = keys.shape(2);
    Attention task{q.data<float>(), stored(keys_, &keys, encoder), stored(values_, &inputs[values], encoder),
                   nullptr, nullptr, out.data<float>(), batch, groups, rows, tokens, q.shape(3), out.shape(3),
                   0, length, scale_, is_causal_};
    if (inputs.size() > mask) {
      const mx::array addends = in_rows(inputs[mask], encoder);
      task.mask = addends.data<float>();
      task.mask_stride = addends.shape(0) > 1 ? length * tokens : 0;
    }
    make_room(task, encoder);
    return task;
  }

 private:
  StoredFormat keys_, values_;
  float scale_;
  bool is_causal_;
  Kernel<SegmentedAttention> combine_;
};

// Words, scales and biases of an array, as mx.quantize gives them.
class QuantizeOperation : public mx::Primitive {
 public:
  QuantizeOperation(int bits, int group, Kernel<Quantization> kernel)
      : mx::Primitive(cpu()), bits_(bits), group_(group), kernel_(kernel) {}
  const char* name() const override { return "NativeQuantize"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const QuantizeOperation&>(other);
    return bits_ == same.bits_ && group_ == same.group_ && kernel_ == same.kernel_;
  }
  void eval_gpu(const Arrays&, Arrays&) override { throw std::runtime_error("this operation is for a CPU"); }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    for (mx::array& out : outputs) out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const Quantization task{in_rows(inputs[0], encoder).data<float>(), outputs[0].data<uint32_t>(),
                            outputs[1].data<float>(), outputs[2].data<float>(), int64_t(outputs[1].size()), bits_, group_};
    encoder.dispatch([task, kernel = kernel_] { compute(task, kernel); });
  }

 private:
  int bits_, group_;
  Kernel<Quantization> kernel_;
};

// And back, as float32.
class DequantizeOperation : public Operation<Dequantization> {
 public:
  DequantizeOperation(int bits, int group, Kernel<Dequantization> kernel)
      : Operation(kernel), bits_(bits), group_(group) {}
  const char* name() const override { return "NativeDequantize"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const DequantizeOperation&>(other);
    return bits_ == same.bits_ && group_ == same.group_ && kernel_ == same.kernel_;
  }

 protected:
  Dequantization task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    const mx::array words = in_rows(inputs[0], encoder), scales = in_rows(inputs[1], encoder);
    const mx::array biases = in_rows(inputs[2], encoder);
    return {words.data<uint32_t>(), scales.data<float>(), biases.data<float>(), out.data<float>(),
            int64_t(scales.size()), bits_,                group_};
  }

 private:
  int bits_, group_;
};

class BlockAttentionOperation : public Operation<BlockAttention> {
 public:
  BlockAttentionOperation(float scale, bool is_causal, Kernel<BlockAttention> kernel)
      : Operation(kernel), scale_(scale), is_causal_(is_causal) {}
  const char* name() const override { return "NativeBlockAttention"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const BlockAttentionOperation&>(other);
    return scale_ == same.scale_ && is_causal_ == same.is_causal_ && kernel_ == same.kernel_;
  }

 protected:
  BlockAttention task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    const mx::array q = by_token(inputs[0], encoder), keys = by_token(inputs[1], encoder);
    const mx::array values = by_token(inputs[2], encoder);
    BlockAttention task{q.data<float>(), keys.data<float>(), values.data<float>(), nullptr, out.data<float>(),
                        q.shape(0), q.shape(1), keys.shape(1), q.shape(2), keys.shape(2), q.shape(3), values.shape(3),
                        {}, {}, {}, {}, scale_, is_causal_};
    set_strides(task.q_strides, q);
    set_strides(task.key_strides, keys);
    set_strides(task.value_strides, values);
    if (inputs.size() > 3) {
      const mx::array mask = by_token(inputs[3], encoder);
      task.mask = mask.data<float>();
      set_strides(task.mask_strides, mask);
    }
    return task;
  }

 private:
  // The last dimension's elements beside each other.
  static mx::array by_token(const mx::array& x, Encoder& encoder) {
    return x.strides(3) == 1 ? x : in_rows(x, encoder);
  }

  static void set_strides(int64_t* strides, const mx::array& x) {
    for (int i = 0; i < 3; i++) strides[i] = x.shape(i) > 1 ? x.strides(i) : 0;
  }

  float scale_;
  bool is_causal_;
};

using Mask = std::optional<mx::array>;

// Their shape but for the last dimension, which is that of the values, after all others and the types of queries and of
// the mask are checked. may_broadcast: a mask may have one row for all heads or tokens.
mx::Shape attended(const mx::array& q, const mx::array& keys, const mx::array& values, const Mask& mask, bool is_causal,
                   bool may_broadcast) {
  for (const mx::array& array : {q, keys, values}) check(array.ndim() == 4);
  check(is_wide(q) && q.shape(0) == keys.shape(0) && keys.shape(0) == values.shape(0) && keys.shape(1) > 0 &&
        q.shape(1) % keys.shape(1) == 0 && keys.shape(1) == values.shape(1) && keys.shape(2) == values.shape(2));
  const int batch = q.shape(0), heads = may_broadcast ? q.shape(1) : 1, length = q.shape(2), tokens = keys.shape(2);
  check(!is_causal || length <= tokens);
  if (mask) {
    check(is_wide(*mask) && mask->ndim() == 4);
    const mx::Shape all{batch, heads, length, tokens};
    for (int i = 0; i < 4; i++) {
      const int size = mask->shape(i);
      check(size == all[i] || (size == 1 && (i == 0 || (i < 3 && may_broadcast))));
    }
  }
  return {batch, q.shape(1), length, values.shape(3)};
}

mx::array attend(const mx::array& q, const StoredArrays& keys, const StoredArrays& values, float scale, const Mask& mask,
                 bool is_causal, const std::string& name) {
  const Arrays own_keys = arrays_of(keys), own_values = arrays_of(values);
  mx::Shape shape = attended(q, own_keys[0], own_values[0], mask, is_causal, false);
  const StoredFormat key_format(own_keys, q.shape(3));
  shape[3] = key_format.dim(own_values[0]);
  const StoredFormat value_format(own_values, shape[3]);
  if (!q.size() || !own_values[0].size()) return mx::zeros(shape, mx::float32, cpu());
  Arrays arrays{q};
  for (const Arrays* own : {&own_keys, &own_values}) arrays.insert(arrays.end(), own->begin(), own->end());
  if (mask) arrays.push_back(*mask);
  auto operation = std::make_shared<AttentionOperation>(key_format, value_format, scale, is_causal, level(name));
  return mx::array(shape, mx::float32, operation, arrays);
}

QuantizedArrays quantize(const mx::array& x, int group, int bits, const std::string& name) {
  check(is_wide(x) && x.ndim() && x.size() && is_known_format(bits, group) && x.shape(-1) % group == 0);
  mx::Shape words = x.shape(), groups = words;
  words.back() = words.back() / 32 * bits, groups.back() /= group;
  auto operation = std::make_shared<QuantizeOperation>(bits, group, level(name).quantize);
  const Arrays parts =
      mx::array::make_arrays({words, groups, groups}, {mx::uint32, mx::float32, mx::float32}, operation, {x});
  return {parts[0], parts[1], parts[2]};
}

mx::array dequantize(const mx::array& words, const mx::array& scales, const mx::array& biases, int group, int bits,
                     const std::string& name) {
  check(scales.ndim() && scales.size() && is_known_format(bits, group));
  mx::Shape shape = scales.shape(), packed = shape;
  shape.back() *= group, packed.back() = shape.back() / 32 * bits;
  check(words.dtype() == mx::uint32 && words.shape() == packed);
  check(is_wide(scales) && is_wide(biases) && biases.shape() == scales.shape());
  auto operation = std::make_shared<DequantizeOperation>(bits, group, level(name).dequantize);
  return mx::array(shape, mx::float32, operation, {words, scales, biases});
}

mx::array attend_in_blocks(const mx::array& q, const mx::array& keys, const mx::array& values, float scale,
                           const Mask& mask, bool is_causal, const std::string& name) {
  mx::Shape shape = attended(q, keys, values, mask, is_causal, true);
  shape[3] = values.shape(3);
  check(is_wide(keys) && is_wide(values) && q.shape(3) == keys.shape(3));
  check(q.shape(3) <= BlockAttention::MOST_DIM && values.shape(3) <= BlockAttention::MOST_DIM);
  if (!q.size() || !values.size()) return mx::zeros(shape, mx::float32, cpu());
  Arrays arrays{q, keys, values};
  if (mask) arrays.push_back(*mask);
  auto operation = std::make_shared<BlockAttentionOperation>(scale, is_causal, level(name).block_attention);
  const mx::array by_token({shape[0], shape[2], shape[1], shape[3]}, mx::float32, operation, arrays);
  return mx::transpose(by_token, {0, 2, 1, 3}, cpu());
}

}  // namespace

void add_attention(nb::module_& m) {
  m.def("attend", &attend, nb::arg("q"), nb::arg("keys"), nb::arg("values"), nb::arg("scale"),
        nb::arg("mask") = nb::none(), nb::arg("is_causal") = false, nb::arg("level") = "");
  m.def("quantize", &quantize, nb::arg("x"), nb::arg("group_size"), nb::arg("bits"), nb::arg("level") = "");
  m.def("dequantize", &dequantize, nb::arg("words"), nb::arg("scales"), nb::arg("biases"), nb::arg("group_size"),
        nb::arg("bits"), nb::arg("level") = "");
  m.def("attend_in_blocks", &attend_in_blocks, nb::arg("q"), nb::arg("keys"), nb::arg("values"), nb::arg("scale"),
        nb::arg("mask") = nb::none(), nb::arg("is_causal") = false, nb::arg("level") = "");
  m.attr("MOST_DIM") = BlockAttention::MOST_DIM;
  m.attr("MOST_QUANTIZED_DIM") = Attention::MOST_DIM;
}
