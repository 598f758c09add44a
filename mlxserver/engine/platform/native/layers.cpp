// Functions between the products of a layer.
#include "operation.h"

namespace {

using Arrays = std::vector<mx::array>;
using Encoder = mx::cpu::CommandEncoder;

class NormOperation : public Operation<Norm> {
 public:
  NormOperation(float eps, Kernel<Norm> kernel) : Operation(kernel), eps_(eps) {}
  const char* name() const override { return "NativeNorm"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const NormOperation&>(other);
    return Operation::is_equivalent(other) && eps_ == same.eps_;
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

// Keys or values whose tokens lie below each other, at least within a head.
mx::array by_head(const mx::array& x, Encoder& encoder) {
  return x.strides(3) == 1 && x.strides(2) == x.shape(3) ? x : in_rows(x, encoder);
}

class AttentionOperation : public Operation<Attention> {
 public:
  AttentionOperation(float scale, bool is_causal, const Level& level)
      : Operation(level.attention), scale_(scale), is_causal_(is_causal), lanes_(level.lanes) {}
  const char* name() const override { return "NativeAttention"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const AttentionOperation&>(other);
    return Operation::is_equivalent(other) && scale_ == same.scale_ && is_causal_ == same.is_causal_;
  }

 protected:
  Attention task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    const mx::array q = in_rows(inputs[0], encoder), keys = by_head(inputs[1], encoder);
    const mx::array values = by_head(inputs[2], encoder);
    const int64_t batch = q.shape(0), groups = keys.shape(1), length = q.shape(2);
    const int64_t rows = q.shape(1) / groups * length, tokens = keys.shape(2);
    float* kept = nullptr;
    if (Attention::keeps_scores(rows, q.shape(3), values.shape(3))) {
      mx::array scores({int(batch * groups), int(rows), int(tokens)}, mx::float32, nullptr, {});
      scores.set_data(mx::allocator::malloc(scores.nbytes()));
      encoder.add_temporary(scores);
      kept = scores.data<float>();
    }
    const float* mask = nullptr;
    int64_t mask_strides[2] = {0, 0};
    if (inputs.size() > 3) {
      const mx::array addends = in_rows(inputs[3], encoder);
      mask = addends.data<float>();
      if (addends.shape(0) > 1) mask_strides[0] = addends.shape(2) * tokens;
      if (addends.shape(2) > 1) mask_strides[1] = tokens;
    }
    return {q.data<float>(), keys.data<float>(), values.data<float>(), mask, kept, out.data<float>(),
            batch, groups, rows, tokens, q.shape(3), values.shape(3),
            {keys.strides(0), keys.strides(1)}, {values.strides(0), values.strides(1)},
            {mask_strides[0], mask_strides[1]}, length, scale_, is_causal_, 3 * lanes_};
  }

 private:
  float scale_;
  bool is_causal_;
  int64_t lanes_;
};

void check(bool fits) {
  if (!fits) throw std::invalid_argument("the shapes or types do not fit");
}

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

mx::array rotate(const mx::array& x, const mx::array& cosines, const mx::array& sines, const std::string& name) {
  check(is_wide(x) && is_wide(cosines) && is_wide(sines) && x.ndim() == 4 && x.shape(3) % 2 == 0);
  const auto angles = size_t(x.shape(2)) * x.shape(3) / 2;
  check((cosines.size() == angles || cosines.size() == x.shape(0) * angles) && sines.size() == 2 * cosines.size() &&
        cosines.shape(0) * angles == cosines.size());
  if (!x.size()) return x;
  auto operation = std::make_shared<RotationOperation>(level(name).rotation);
  return mx::array(x.shape(), mx::float32, operation, {x, cosines, sines});
}

mx::array attend(const mx::array& q, const mx::array& keys, const mx::array& values, float scale,
                 const std::optional<mx::array>& mask, bool is_causal, const std::string& name) {
  check(is_wide(q) && is_wide(keys) && is_wide(values) && q.ndim() == 4 && keys.ndim() == 4 && values.ndim() == 4);
  check(q.shape(0) == keys.shape(0) && keys.shape(0) == values.shape(0) && keys.shape(1) > 0 &&
        q.shape(1) % keys.shape(1) == 0 && keys.shape(1) == values.shape(1) && keys.shape(2) == values.shape(2) &&
        q.shape(3) == keys.shape(3));
  const int batch = q.shape(0), length = q.shape(2), tokens = keys.shape(2);
  check(!is_causal || length <= tokens);
  Arrays arrays{q, keys, values};
  if (mask) {
    check(is_wide(*mask) && mask->ndim() == 4 && mask->shape(1) == 1 && mask->shape(3) == tokens);
    check((mask->shape(0) == 1 || mask->shape(0) == batch) && (mask->shape(2) == 1 || mask->shape(2) == length));
    arrays.push_back(*mask);
  }
  const mx::Shape shape{batch, q.shape(1), length, values.shape(3)};
  if (!q.size() || !values.size()) return mx::zeros(shape, mx::float32, cpu());
  auto operation = std::make_shared<AttentionOperation>(scale, is_causal, level(name));
  return mx::array(shape, mx::float32, operation, arrays);
}

}  // namespace

void add_functions(nb::module_& m) {
  m.def("rms_norm", &norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("level") = "");
  m.def("swiglu", &gate, nb::arg("gate"), nb::arg("x"), nb::arg("level") = "");
  m.def("rotate", &rotate, nb::arg("x"), nb::arg("cosines"), nb::arg("sines"), nb::arg("level") = "");
  m.def("attend", &attend, nb::arg("q"), nb::arg("keys"), nb::arg("values"), nb::arg("scale"),
        nb::arg("mask") = nb::none(), nb::arg("is_causal") = false, nb::arg("level") = "");
}
