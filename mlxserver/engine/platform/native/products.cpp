// Products of float32 rows with weights, quantized or not.
#include "operation.h"

namespace {

int type_of(const mx::array& weights) {
  return weights.dtype() == mx::float32 ? 0 : weights.dtype() == mx::float16 ? 1 : 2;
}

bool is_float(mx::Dtype type) { return type == mx::float32 || type == mx::float16 || type == mx::bfloat16; }

// Weights in the order of their rows, which they nearly always are in.
mx::array in_order(const mx::array& weights) {
  const bool is_ordered = weights.is_available() && weights.flags().row_contiguous;
  return is_ordered ? weights : mx::contiguous(weights, false, cpu());
}

class QuantizedProduct : public Operation<Quantized> {
 public:
  QuantizedProduct(int bits, int group, Kernel<Quantized> kernel) : Operation(kernel), bits_(bits), group_(group) {}

  const char* name() const override { return "QuantizedProduct"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const QuantizedProduct&>(other);
    return Operation::is_equivalent(other) && bits_ == same.bits_ && group_ == same.group_;
  }

 protected:
  Quantized task(const std::vector<mx::array>& inputs, mx::array& out, mx::cpu::CommandEncoder& encoder) const override {
    const mx::array x = in_rows(inputs[0], encoder);
    const mx::array &words = inputs[1], &scales = inputs[2], &biases = inputs[3];
    const int64_t width = x.shape(-1), rows = int64_t(x.size()) / width, outputs = words.shape(0);
    return {x.data<float>(),   words.data<uint32_t>(), scales.data<void>(), biases.data<void>(),
            out.data<float>(), rows,                   width,               outputs,
            bits_,             group_,                 type_of(scales)};
  }

 private:
  int bits_, group_;
};

class DenseProduct : public Operation<Dense> {
 public:
  explicit DenseProduct(const Level& level) : Operation(level.dense), columns_(level.columns), lanes_(level.lanes) {}

  const char* name() const override { return "DenseProduct"; }

 protected:
  Dense task(const std::vector<mx::array>& inputs, mx::array& out, mx::cpu::CommandEncoder& encoder) const override {
    const mx::array x = in_rows(inputs[0], encoder);
    const mx::array& weight = inputs[1];
    const float* bias = inputs.size() > 2 ? inputs[2].data<float>() : nullptr;
    const int64_t width = x.shape(-1), rows = int64_t(x.size()) / width, outputs = weight.shape(0);
    return {x.data<float>(),  columns(x, rows, width, encoder), weight.data<void>(), bias,
            out.data<float>(), rows, width, outputs, type_of(weight)};
  }

 private:
  // The rows as columns, if they are more than one vector.
  const float* columns(const mx::array& x, int64_t rows, int64_t width, mx::cpu::CommandEncoder& encoder) const {
    const int64_t vectors = vectors_of(rows, lanes_);
    if (vectors < 2) return nullptr;
    mx::array columns({int(vectors), int(width), int(lanes_)}, mx::float32, nullptr, {});
    columns.set_data(mx::allocator::malloc(columns.nbytes()));
    encoder.add_temporary(columns);
    const Columns task{x.data<float>(), columns.data<float>(), rows, width, vectors, lanes_};
    encoder.dispatch([task, kernel = columns_] { compute(task, kernel); });
    return columns.data<float>();
  }

  Kernel<Columns> columns_;
  int64_t lanes_;
};

mx::array product(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
                  int group, int bits, const std::string& name) {
  const bool is_known = (bits == 4 || bits == 8) && (group == 32 || group == 64 || group == 128);
  const auto type = scales.dtype();
  const bool is_typed = words.dtype() == mx::uint32 && biases.dtype() == type && is_float(type);
  if (!is_known || !is_typed) throw std::invalid_argument("weights of this format have no kernel");
  const int outputs = words.ndim() == 2 ? words.shape(0) : 0, inputs = x.ndim() ? x.shape(-1) : 0;
  const mx::Shape groups{outputs, inputs / group};
  if (!outputs || !inputs || inputs % group || words.shape(1) != inputs / 32 * bits || scales.shape() != groups ||
      biases.shape() != groups)
    throw std::invalid_argument("the shapes of the product do not fit");
  auto shape = x.shape();
  shape.back() = outputs;
  if (!x.size()) return mx::zeros(shape, mx::float32, cpu());
  std::vector<mx::array> arrays{mx::astype(x, mx::float32, cpu()), in_order(words), in_order(scales), in_order(biases)};
  auto operation = std::make_shared<QuantizedProduct>(bits, group, level(name).quantized);
  return mx::array(shape, mx::float32, operation, arrays);
}

mx::array dense(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                const std::string& name) {
  if (!is_float(weight.dtype())) throw std::invalid_argument("weights of this type have no kernel");
  const int outputs = weight.ndim() == 2 ? weight.shape(0) : 0, inputs = x.ndim() ? x.shape(-1) : 0;
  if (!outputs || !inputs || weight.shape(1) != inputs || (bias && bias->shape() != mx::Shape{outputs}))
    throw std::invalid_argument("the shapes of the product do not fit");
  auto shape = x.shape();
  shape.back() = outputs;
  if (!x.size()) return mx::zeros(shape, mx::float32, cpu());
  std::vector<mx::array> arrays{mx::astype(x, mx::float32, cpu()), in_order(weight)};
  if (bias) arrays.push_back(in_order(mx::astype(*bias, mx::float32, cpu())));
  return mx::array(shape, mx::float32, std::make_shared<DenseProduct>(level(name)), arrays);
}

}  // namespace

void add_products(nb::module_& m) {
  m.def("product", &product, nb::arg("x"), nb::arg("words"), nb::arg("scales"), nb::arg("biases"), nb::arg("group"),
        nb::arg("bits"), nb::arg("level") = "");
  m.def("dense", &dense, nb::arg("x"), nb::arg("weight"), nb::arg("bias") = nb::none(), nb::arg("level") = "");
}
