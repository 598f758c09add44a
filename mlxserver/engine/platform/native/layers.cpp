// Functions between the products of a layer.
#include "stored.h"

namespace {

using Arrays = std::vector<mx::array>;
using Encoder = mx::cpu::CommandEncoder;

class NormOperation : public Operation<Norm> {
 public:
  NormOperation(float eps, Kernel<Norm> kernel) : Operation(kernel), eps_(eps) {}
  const char* name() const override { return "NativeNorm"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const NormOperation&>(other);
    return eps_ == same.eps_ && kernel_ == same.kernel_;
  }

 protected:
  Norm task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    const mx::array x = in_rows(inputs[0], encoder), weight = in_rows(inputs[1], encoder);
    const int64_t width = x.shape(-1);
    return {x.data<float>(), weight.data<float>(), out.data<float>(), int64_t(x.size()) / width, width, eps_};
  }

 private:
  float eps_;
};

class GateOperation : public Operation<Gate> {
 public:
  using Operation::Operation;
  const char* name() const override { return "NativeGate"; }

 protected:
  Gate task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    const mx::array gate = in_rows(inputs[0], encoder), x = in_rows(inputs[1], encoder);
    return {gate.data<float>(), x.data<float>(), out.data<float>(), int64_t(x.size())};
  }
};

class LayerNormOperation : public Operation<LayerNorm> {
 public:
  LayerNormOperation(float eps, Kernel<LayerNorm> kernel) : Operation(kernel), eps_(eps) {}
  const char* name() const override { return "NativeLayerNorm"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const LayerNormOperation&>(other);
    return eps_ == same.eps_ && kernel_ == same.kernel_;
  }

 protected:
  LayerNorm task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    const mx::array x = in_rows(inputs[0], encoder), weight = in_rows(inputs[1], encoder);
    const float* bias = inputs.size() > 2 ? in_rows(inputs[2], encoder).data<float>() : nullptr;
    const int64_t width = x.shape(-1);
    return {x.data<float>(), weight.data<float>(), bias, out.data<float>(), int64_t(x.size()) / width, width, eps_};
  }

 private:
  float eps_;
};

class GeluOperation : public Operation<Gelu> {
 public:
  using Operation::Operation;
  const char* name() const override { return "NativeGelu"; }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

 protected:
  Gelu task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    return {in_rows(inputs[0], encoder).data<float>(), out.data<float>(), int64_t(out.size())};
  }
};

class SwishOperation : public Operation<Swish> {
 public:
  SwishOperation(float slope, float cubic, Kernel<Swish> kernel) : Operation(kernel), slope_(slope), cubic_(cubic) {}
  const char* name() const override { return "NativeSwish"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const SwishOperation&>(other);
    return slope_ == same.slope_ && cubic_ == same.cubic_ && kernel_ == same.kernel_;
  }
  // Of a function that is compiled for any shape.
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

 protected:
  Swish task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    return {in_rows(inputs[0], encoder).data<float>(), out.data<float>(), int64_t(out.size()), slope_, cubic_};
  }

 private:
  float slope_, cubic_;
};

class RotationOperation : public Operation<Rotation> {
 public:
  using Operation::Operation;
  const char* name() const override { return "NativeRotation"; }

 protected:
  Rotation task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    const mx::array x = inputs[0].strides(3) == 1 ? inputs[0] : in_rows(inputs[0], encoder);
    const mx::array cosines = in_rows(inputs[1], encoder), sines = in_rows(inputs[2], encoder);
    const int64_t tokens = x.shape(2), dim = x.shape(3);
    return {x.data<float>(), cosines.data<float>(), sines.data<float>(), out.data<float>(),
            x.shape(0),      x.shape(1),            tokens,              dim,
            {x.strides(0), x.strides(1), x.strides(2)}, cosines.shape(0) > 1 ? tokens * dim / 2 : 0};
  }
};

class AttentionOperation : public Operation<Attention> {
 public:
  AttentionOperation(const StoredFormat& keys, const StoredFormat& values, float scale, bool is_causal,
                     const Level& level)
      : Operation(level.attention), keys_(keys), values_(values), scale_(scale), is_causal_(is_causal),
        combine_(level.combine) {}
  const char* name() const override { return "NativeAttention"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const AttentionOperation&>(other);
    return keys_ == same.keys_ && values_ == same.values_ && scale_ == same.scale_ && is_causal_ == same.is_causal_ && kernel_ == same.kernel_;
  }

  void eval_cpu(const Arrays& inputs, mx::array& out) override {
    allocate(out);
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.dispatch([task = this->task(inputs, out, encoder), kernel = kernel_, combine = combine_] {
      compute(task, kernel);
      if (task.partial) compute(SegmentedAttention{task}, combine);
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
    const int64_t width = batch * groups * task.segments() * rows * task.partial_width();
    if (task.segments() > 1) task.partial = room<float>(width, encoder);
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

bool is_wide(const mx::array& x) { return x.dtype() == mx::float32; }

mx::array norm(const mx::array& x, const mx::array& weight, float eps, const std::string& name) {
  check(is_wide(x) && is_wide(weight) && x.ndim() && weight.shape() == mx::Shape{x.shape(-1)});
  if (!x.size()) return x;
  return mx::array(x.shape(), mx::float32, std::make_shared<NormOperation>(eps, level(name).norm), {x, weight});
}

mx::array gate(const mx::array& gate, const mx::array& x, const std::string& name) {
  check(is_wide(x) && is_wide(gate) && x.shape() == gate.shape());
  if (!x.size()) return x;
  return mx::array(x.shape(), mx::float32, std::make_shared<GateOperation>(level(name).gate), {gate, x});
}

mx::array layer_norm(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias, float eps,
                     const std::string& name) {
  check(is_wide(x) && is_wide(weight) && x.ndim() && weight.shape() == mx::Shape{x.shape(-1)});
  check(!bias || (is_wide(*bias) && bias->shape() == weight.shape()));
  if (!x.size()) return x;
  Arrays arrays{x, weight};
  if (bias) arrays.push_back(*bias);
  auto operation = std::make_shared<LayerNormOperation>(eps, level(name).layer_norm);
  return mx::array(x.shape(), mx::float32, operation, arrays);
}

mx::array gelu(const mx::array& x, const std::string& name) {
  check(is_wide(x));
  if (!x.size()) return x;
  return mx::array(x.shape(), mx::float32, std::make_shared<GeluOperation>(level(name).gelu), {x});
}

mx::array swish(const mx::array& x, float slope, float cubic, const std::string& name) {
  check(is_wide(x));
  if (!x.size()) return x;
  return mx::array(x.shape(), mx::float32, std::make_shared<SwishOperation>(slope, cubic, level(name).swish), {x});
}

mx::array rotate(const mx::array& x, const mx::array& cosines, const mx::array& sines, const std::string& name) {
  check(is_wide(x) && is_wide(cosines) && is_wide(sines) && x.ndim() == 4 && x.shape(3) % 2 == 0);
  const auto angles = size_t(x.shape(2)) * x.shape(3) / 2;
  check((cosines.size() == angles || cosines.size() == x.shape(0) * angles) && sines.size() == 2 * cosines.size() &&
        cosines.shape(0) * angles == cosines.size());
  if (!x.size()) return x;
  auto operation = std::make_shared<RotationOperation>(level(name).rotation);
  return mx::array(x.shape(), mx::float32, operation, {x, cosines, sines});
}

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
  check(is_wide(x) && x.ndim() && x.size() && (bits == 4 || bits == 8) && (group == 32 || group == 64 || group == 128) &&
        x.shape(-1) % group == 0);
  mx::Shape words = x.shape(), groups = words;
  words.back() = words.back() / 32 * bits, groups.back() /= group;
  auto operation = std::make_shared<QuantizeOperation>(bits, group, level(name).quantize);
  const Arrays parts =
      mx::array::make_arrays({words, groups, groups}, {mx::uint32, mx::float32, mx::float32}, operation, {x});
  return {parts[0], parts[1], parts[2]};
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

void add_functions(nb::module_& m) {
  m.def("rms_norm", &norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("level") = "");
  m.def("swiglu", &gate, nb::arg("gate"), nb::arg("x"), nb::arg("level") = "");
  m.def("layer_norm", &layer_norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"),
        nb::arg("level") = "");
  m.def("gelu", &gelu, nb::arg("x"), nb::arg("level") = "");
  m.def("swish", &swish, nb::arg("x"), nb::arg("slope"), nb::arg("cubic") = 0.0f, nb::arg("level") = "");
  m.def("rotate", &rotate, nb::arg("x"), nb::arg("cosines"), nb::arg("sines"), nb::arg("level") = "");
  m.def("attend", &attend, nb::arg("q"), nb::arg("keys"), nb::arg("values"), nb::arg("scale"),
        nb::arg("mask") = nb::none(), nb::arg("is_causal") = false, nb::arg("level") = "");
  m.def("quantize", &quantize, nb::arg("x"), nb::arg("group_size"), nb::arg("bits"), nb::arg("level") = "");
  m.def("attend_in_blocks", &attend_in_blocks, nb::arg("q"), nb::arg("keys"), nb::arg("values"), nb::arg("scale"),
        nb::arg("mask") = nb::none(), nb::arg("is_causal") = false, nb::arg("level") = "");
  m.attr("MOST_DIM") = BlockAttention::MOST_DIM;
  m.attr("MOST_QUANTIZED_DIM") = Attention::MOST_DIM;
}
