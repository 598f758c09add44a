// Extension of MLX: products of float32 rows with weights, quantized or not, as operations of a CPU stream.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>

#include "kernel.h"
#include "mlx/allocator.h"
#include "mlx/backend/common/utils.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "threads.h"

namespace mx = mlx::core;
namespace nb = nanobind;

namespace {

struct Level {
  const char* name;
  Kernel<Quantized> quantized;
  Kernel<Dense> dense;
};

// Instruction sets that this CPU has, the best one first.
std::vector<Level> levels() {
  std::vector<Level> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", quantized_avx512, dense_avx512});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", quantized_avx2, dense_avx2});
  found.push_back({"sse2", quantized_portable, dense_portable});
#elif defined(__aarch64__)
  found.push_back({"neon", quantized_portable, dense_portable});
#else
  found.push_back({"portable", quantized_portable, dense_portable});
#endif
  return found;
}

Level level(const std::string& name) {
  for (const Level& level : levels())
    if (name.empty() || name == level.name) return level;
  throw std::invalid_argument("this CPU has no instruction set " + name);
}

// An array's elements in the order of its rows, whatever its strides are.
void copy_rows(const mx::array& from, float* out) {
  const float* data = from.data<float>();
  for (int64_t i = 0; i < int64_t(from.size()); i++) out[i] = data[mx::elem_to_loc(i, from.shape(), from.strides())];
}

// Rows of the last dimension in their order; a copy of them, if they lie otherwise.
mx::array rows_of(const mx::array& x, mx::cpu::CommandEncoder& encoder) {
  if (x.flags().row_contiguous) return x;
  mx::array rows(x.shape(), mx::float32, nullptr, {});
  rows.set_data(mx::allocator::malloc(rows.nbytes()));
  encoder.add_temporary(rows);
  encoder.dispatch([from = mx::array::unsafe_weak_copy(x), out = rows.data<float>()] { copy_rows(from, out); });
  return rows;
}

int type_of(const mx::array& weights) {
  return weights.dtype() == mx::float32 ? 0 : weights.dtype() == mx::float16 ? 1 : 2;
}

bool is_float(mx::Dtype type) { return type == mx::float32 || type == mx::float16 || type == mx::bfloat16; }

template <typename Product>
void compute(const Product& p, Kernel<Product> kernel) noexcept {
  // Pieces of 16,000 multiplications or more, some eight per thread at most.
  int64_t piece = (16384 + p.inputs * p.rows - 1) / (p.inputs * p.rows);
  if (piece < p.outputs / 32) piece = p.outputs / 32;
  piece = (piece + OUTPUTS - 1) / OUTPUTS * OUTPUTS;
  helpers().run((p.outputs + piece - 1) / piece, [&](int64_t n) noexcept {
    const int64_t last = (n + 1) * piece;
    kernel(p, n * piece, last < p.outputs ? last : p.outputs);
  });
}

template <typename Product>
class Operation : public mx::UnaryPrimitive {
 public:
  Operation(mx::Stream stream, Kernel<Product> kernel) : mx::UnaryPrimitive(stream), kernel_(kernel) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const Product product = this->product(rows_of(inputs[0], encoder), inputs, out);
    encoder.dispatch([product, kernel = kernel_] { compute(product, kernel); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("this product is for a CPU");
  }

 protected:
  virtual Product product(const mx::array& x, const std::vector<mx::array>& inputs, mx::array& out) const = 0;

  Kernel<Product> kernel_;
};

class QuantizedProduct : public Operation<Quantized> {
 public:
  QuantizedProduct(mx::Stream stream, int bits, int group, Kernel<Quantized> kernel)
      : Operation(stream, kernel), bits_(bits), group_(group) {}

  const char* name() const override { return "QuantizedProduct"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const QuantizedProduct&>(other);
    return bits_ == same.bits_ && group_ == same.group_ && kernel_ == same.kernel_;
  }

 protected:
  Quantized product(const mx::array& x, const std::vector<mx::array>& inputs, mx::array& out) const override {
    const mx::array &words = inputs[1], &scales = inputs[2], &biases = inputs[3];
    const int64_t width = x.shape(-1);
    return {x.data<float>(),   words.data<uint32_t>(),     scales.data<void>(), biases.data<void>(),
            out.data<float>(), int64_t(x.size()) / width, width,               int64_t(words.shape(0)),
            bits_,             group_,                     type_of(scales)};
  }

 private:
  int bits_, group_;
};

class DenseProduct : public Operation<Dense> {
 public:
  using Operation::Operation;

  const char* name() const override { return "DenseProduct"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return kernel_ == static_cast<const DenseProduct&>(other).kernel_;
  }

 protected:
  Dense product(const mx::array& x, const std::vector<mx::array>& inputs, mx::array& out) const override {
    const mx::array& weight = inputs[1];
    const int64_t width = x.shape(-1);
    return {x.data<float>(),   weight.data<void>(),        inputs.size() > 2 ? inputs[2].data<float>() : nullptr,
            out.data<float>(), int64_t(x.size()) / width, width,
            int64_t(weight.shape(0)), type_of(weight)};
  }
};

// Weights in the order of their rows, which they nearly always are in.
mx::array in_order(const mx::array& weights, mx::Stream stream) {
  const bool is_ordered = weights.is_available() && weights.flags().row_contiguous;
  return is_ordered ? weights : mx::contiguous(weights, false, stream);
}

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
  auto stream = mx::default_stream(mx::Device::cpu);
  if (!x.size()) return mx::zeros(shape, mx::float32, stream);
  std::vector<mx::array> arrays{mx::astype(x, mx::float32, stream), in_order(words, stream), in_order(scales, stream),
                                in_order(biases, stream)};
  auto operation = std::make_shared<QuantizedProduct>(stream, bits, group, level(name).quantized);
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
  auto stream = mx::default_stream(mx::Device::cpu);
  if (!x.size()) return mx::zeros(shape, mx::float32, stream);
  std::vector<mx::array> arrays{mx::astype(x, mx::float32, stream), in_order(weight, stream)};
  if (bias) arrays.push_back(in_order(mx::astype(*bias, mx::float32, stream), stream));
  return mx::array(shape, mx::float32, std::make_shared<DenseProduct>(stream, level(name).dense), arrays);
}

}  // namespace

NB_MODULE(MODULE, m) {
  nb::module_::import_("mlx.core");
  m.def("product", &product, nb::arg("x"), nb::arg("words"), nb::arg("scales"), nb::arg("biases"), nb::arg("group"),
        nb::arg("bits"), nb::arg("level") = "");
  m.def("dense", &dense, nb::arg("x"), nb::arg("weight"), nb::arg("bias") = nb::none(), nb::arg("level") = "");
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Level& level : levels()) names.push_back(level.name);
    return names;
  });
}
