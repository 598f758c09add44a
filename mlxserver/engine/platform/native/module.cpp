// Extension of MLX: products and functions of the layers of a language model, as operations of a CPU stream.
#include "operation.h"

#include <nanobind/stl/vector.h>

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#define POINTER(KERNEL, TASK, LEVEL) KERNEL##_##LEVEL,
#define LEVEL(TITLE, LANES, NAME) {TITLE, LANES, KERNELS(POINTER, NAME)}

// An array's elements in the order of its rows, whatever its strides are.
void copy_rows(const mx::array& from, float* out) {
  const float* data = from.data<float>();
  const int64_t width = from.ndim() && from.strides(-1) == 1 ? from.shape(-1) : 1;
  for (int64_t i = 0; i < int64_t(from.size()); i += width)
    std::memcpy(out + i, data + mx::elem_to_loc(i, from.shape(), from.strides()), width * sizeof(float));
}

// GCC's __builtin_cpu_supports() knows this one from version 11 on only.
bool has_f16c() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
#else
  return false;
#endif
}

std::vector<Level> found() {
  std::vector<Level> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back(LEVEL("avx512", 16, avx512));
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
    found.push_back(LEVEL("avx2", 8, avx2));
  found.push_back(LEVEL("sse2", 4, portable));
#elif defined(__aarch64__)
  found.push_back(LEVEL("neon", 4, portable));
#else
  found.push_back(LEVEL("portable", 4, portable));
#endif
  return found;
}

}  // namespace

// The instruction that asks for a CPU's features takes long in a virtual machine.
const std::vector<Level>& levels() {
  static const std::vector<Level> all = found();
  return all;
}

Level level(const std::string& name) {
  for (const Level& level : levels())
    if (name.empty() || name == level.name) return level;
  throw std::invalid_argument("this CPU has no instruction set " + name);
}

mx::array in_rows(const mx::array& x, mx::cpu::CommandEncoder& encoder) {
  if (x.flags().row_contiguous) return x;
  mx::array rows(x.shape(), mx::float32, nullptr, {});
  allocate(rows);
  encoder.add_temporary(rows);
  encoder.dispatch([from = mx::array::unsafe_weak_copy(x), out = rows.data<float>()] { copy_rows(from, out); });
  return rows;
}

namespace {

// A copy of an array, in memory that begins with a line of the caches.
class Aligned : public mx::UnaryPrimitive {
 public:
  Aligned() : mx::UnaryPrimitive(cpu()) {}
  const char* name() const override { return "Aligned"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    allocate(out);
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.dispatch([from = inputs[0].data<char>(), to = out.data<char>(), bytes = out.nbytes()] {
      std::memcpy(to, from, bytes);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("this operation is for a CPU");
  }
};

mx::array aligned(const mx::array& x) {
  if (!x.size()) return x;
  return mx::array(x.shape(), x.dtype(), std::make_shared<Aligned>(), {mx::contiguous(x, false, cpu())});
}

}  // namespace

NB_MODULE(MODULE, m) {
  nb::module_::import_("mlx.core");
  add_products(m);
  add_functions(m);
  add_attention(m);
  add_decoder(m);
  add_sampling(m);
  add_recurrences(m);
  m.def("aligned", &aligned, nb::arg("x"));
  m.def("is_computed", [](const mx::array& array) { return array.status() != mx::array::Status::unscheduled; });
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Level& level : levels()) names.push_back(level.name);
    return names;
  });
}
