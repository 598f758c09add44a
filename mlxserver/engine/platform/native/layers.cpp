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

}  // namespace

void add_functions(nb::module_& m) {
  m.def("rms_norm", &norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("level") = "");
  m.def("swiglu", &gate, nb::arg("gate"), nb::arg("x"), nb::arg("level") = "");
  m.def("layer_norm", &layer_norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"),
        nb::arg("level") = "");
  m.def("gelu", &gelu, nb::arg("x"), nb::arg("level") = "");
  m.def("swish", &swish, nb::arg("x"), nb::arg("slope"), nb::arg("cubic") = 0.0f, nb::arg("level") = "");
  m.def("rotate", &rotate, nb::arg("x"), nb::arg("cosines"), nb::arg("sines"), nb::arg("level") = "");
}
