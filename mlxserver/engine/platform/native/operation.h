// Operations of a CPU stream of MLX that run a kernel, with the threads of threads.h.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

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

// Kernels of an instruction set.
struct Level {
  const char* name;
  int lanes;
#define MEMBER(KERNEL, TASK, LEVEL) Kernel<TASK> KERNEL;
  KERNELS(MEMBER, )
#undef MEMBER
};

// Instruction sets that this CPU has, the best one first.
const std::vector<Level>& levels();

// One of them; the best one for "". Raises invalid_argument.
Level level(const std::string& name);

void add_products(nb::module_& m);
void add_functions(nb::module_& m);
void add_attention(nb::module_& m);
void add_decoder(nb::module_& m);
void add_sampling(nb::module_& m);
void add_recurrences(nb::module_& m);

// Raise invalid_argument unless shapes and types fit.
inline void check(bool fits) {
  if (!fits) throw std::invalid_argument("the shapes or types do not fit");
}

// Whether there are kernels for MLX's affine format of so many bits, in groups of so many values.
inline bool is_known_format(int bits, int group) {
  return (bits == 4 || bits == 8) && (group == 32 || group == 64 || group == 128);
}

inline bool is_wide(const mx::array& x) { return x.dtype() == mx::float32; }

// An array's elements in the order of its rows; a copy of them, if they lie otherwise.
mx::array in_rows(const mx::array& x, mx::cpu::CommandEncoder& encoder);

constexpr uintptr_t LINE = 64;  // bytes of a line of the caches

// Give an array memory that begins with a line: a vector of 64 bytes takes twice as long if it is of two.
inline void allocate(mx::array& out) {
  mx::allocator::Data data = mx::allocator::malloc(out.nbytes() + LINE);
  const int64_t offset = -reinterpret_cast<uintptr_t>(data.buffer().raw_ptr()) % LINE;
  const bool is_column = out.size() <= 1 || out.size() == size_t(*std::max_element(out.shape().begin(), out.shape().end()));
  out.set_data(std::move(data), out.size(), out.strides(), {true, true, is_column}, offset);
}

// Room for so many elements until what is dispatched has been computed.
template <typename T>
T* room(int64_t size, mx::cpu::CommandEncoder& encoder) {
  mx::array array({int(size)}, mx::TypeToDtype<T>(), nullptr, {});
  allocate(array);
  encoder.add_temporary(array);
  return array.data<T>();
}

inline mx::Stream cpu() { return mx::default_stream(mx::Device::cpu); }

// Pieces of a task, of 16,000 multiplications or more, some eight per thread at most.
struct Pieces {
  int64_t items, size, count;

  template <typename Task>
  explicit Pieces(const Task& task) : items(task.items()), size((16384 + task.work() - 1) / task.work()) {
    if (size < items / 32) size = items / 32;
    size = parts_of(size, together<Task>()) * together<Task>();
    count = (items + size - 1) / size;
  }

  int64_t first(int64_t piece) const { return piece * size < items ? piece * size : items; }
};

template <typename Task>
void compute(const Task& task, Kernel<Task> kernel) noexcept {
  const Pieces pieces(task);
  helpers().run(pieces.count, [&](int64_t n) noexcept { kernel(task, pieces.first(n), pieces.first(n + 1)); });
}

template <typename Task>
class Operation : public mx::UnaryPrimitive {
 public:
  explicit Operation(Kernel<Task> kernel) : mx::UnaryPrimitive(cpu()), kernel_(kernel) {}

  // Of two operations of one class, as MLX asks it.
  bool is_equivalent(const mx::Primitive& other) const override {
    return kernel_ == static_cast<const Operation&>(other).kernel_;
  }

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    allocate(out);
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.dispatch([task = this->task(inputs, out, encoder), kernel = kernel_] { compute(task, kernel); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("this operation is for a CPU");
  }

 protected:
  // What the kernel is to compute. Copies of inputs are dispatched first.
  virtual Task task(const std::vector<mx::array>& inputs, mx::array& out, mx::cpu::CommandEncoder& encoder) const = 0;

  Kernel<Task> kernel_;
};
