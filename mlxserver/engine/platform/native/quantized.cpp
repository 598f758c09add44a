// Extension of MLX: the product of float32 rows with quantized weights, as an operation of a CPU stream.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
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
  Kernel kernel;
};

// Instruction sets that this CPU has, the best one first.
std::vector<Level> levels() {
  std::vector<Level> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", product_avx512});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", product_avx2});
  found.push_back({"sse2", product_portable});
#elif defined(__aarch64__)
  found.push_back({"neon", product_portable});
#else
  found.push_back({"portable", product_portable});
#endif
  return found;
}

Kernel kernel(const std::string& name) {
  for (const Level& level : levels())
    if (name.empty() || name == level.name) return level.kernel;
  throw std::invalid_argument("this CPU has no instruction set " + name);
}

// An array's elements in the order of its rows, whatever its strides are.
void copy_rows(const mx::array& from, float* out) {
  const float* data = from.data<float>();
  for (int64_t i = 0; i < int64_t(from.size()); i++) out[i] = data[mx::elem_to_loc(i, from.shape(), from.strides())];
}

void compute(const Product& p, Kernel kernel) noexcept {
  // Pieces of 16,000 multiplications or more, some eight per thread at most.
  int64_t piece = (16384 + p.inputs * p.rows - 1) / (p.inputs * p.rows);
  if (piece < p.outputs / 32) piece = p.outputs / 32;
  piece = (piece + OUTPUTS - 1) / OUTPUTS * OUTPUTS;
  helpers().run((p.outputs + piece - 1) / piece, [&](int64_t n) noexcept {
    const int64_t last = (n + 1) * piece;
    kernel(p, n * piece, last < p.outputs ? last : p.outputs);
  });
}

class QuantizedProduct : public mx::UnaryPrimitive {
 public:
  QuantizedProduct(mx::Stream stream, int bits, int group, Kernel kernel)
      : mx::UnaryPrimitive(stream), bits_(bits), group_(group), kernel_(kernel) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    mx::array x = inputs[0];
    const mx::array &words = inputs[1], &scales = inputs[2], &biases = inputs[3];
    if (!x.flags().row_contiguous) {
      x = mx::array(x.shape(), mx::float32, nullptr, {});
      x.set_data(mx::allocator::malloc(x.nbytes()));
      encoder.add_temporary(x);
      encoder.dispatch([from = mx::array::unsafe_weak_copy(inputs[0]), out = x.data<float>()] { copy_rows(from, out); });
    }
    const int type = scales.dtype() == mx::float32 ? 0 : scales.dtype() == mx::float16 ? 1 : 2;
    const int64_t width = x.shape(-1);
    Product product{x.data<float>(),      words.data<uint32_t>(), scales.data<void>(),         biases.data<void>(),
                    out.data<float>(),    int64_t(x.size()) / width, width, int64_t(words.shape(0)), bits_,
                    group_,               type};
    encoder.dispatch([product, kernel = kernel_] { compute(product, kernel); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("the quantized product is for a CPU");
  }

  const char* name() const override { return "QuantizedProduct"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const QuantizedProduct&>(other);
    return bits_ == same.bits_ && group_ == same.group_ && kernel_ == same.kernel_;
  }

 private:
  int bits_, group_;
  Kernel kernel_;
};

mx::array product(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
                  int group, int bits, const std::string& level) {
  const bool is_known = (bits == 4 || bits == 8) && (group == 32 || group == 64 || group == 128);
  const auto type = scales.dtype();
  const bool is_typed = words.dtype() == mx::uint32 && biases.dtype() == type &&
      (type == mx::float32 || type == mx::float16 || type == mx::bfloat16);
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
  std::vector<mx::array> arrays{mx::astype(x, mx::float32, stream), words, scales, biases};
  for (size_t i = 1; i < arrays.size(); i++)
    if (!arrays[i].is_available() || !arrays[i].flags().row_contiguous)
      arrays[i] = mx::contiguous(arrays[i], false, stream);
  return mx::array(shape, mx::float32, std::make_shared<QuantizedProduct>(stream, bits, group, kernel(level)), arrays);
}

}  // namespace

NB_MODULE(MODULE, m) {
  nb::module_::import_("mlx.core");
  m.def("product", &product, nb::arg("x"), nb::arg("words"), nb::arg("scales"), nb::arg("biases"), nb::arg("group"),
        nb::arg("bits"), nb::arg("level") = "");
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Level& level : levels()) names.push_back(level.name);
    return names;
  });
}
