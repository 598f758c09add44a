// Operations of a CPU stream of MLX that run a kernel, with the threads of threads.h.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

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
  Kernel<Quantized> quantized;
  Kernel<Dense> dense;
  Kernel<Columns> columns;
  Kernel<Norm> norm;
  Kernel<Gate> gate;
  Kernel<Rotation> rotation;
  Kernel<Attention> attention;
  Kernel<LayerNorm> layer_norm;
  Kernel<Gelu> gelu;
  Kernel<Swish> swish;
  Kernel<BlockAttention> block_attention;
};

// Instruction sets that this CPU has, the best one first.
const std::vector<Level>& levels();

// One of them; the best one for "". Raises invalid_argument.
Level level(const std::string& name);

void add_products(nb::module_& m);
void add_functions(nb::module_& m);

// An array's elements in the order of its rows; a copy of them, if they lie otherwise.
mx::array in_rows(const mx::array& x, mx::cpu::CommandEncoder& encoder);

// Room for so many elements until what is dispatched has been computed.
template <typename T>
T* room(int64_t size, mx::cpu::CommandEncoder& encoder) {
  mx::array array({int(size)}, mx::TypeToDtype<T>(), nullptr, {});
  array.set_data(mx::allocator::malloc(array.nbytes()));
  encoder.add_temporary(array);
  return array.data<T>();
}

inline mx::Stream cpu() { return mx::default_stream(mx::Device::cpu); }

template <typename Task>
void compute(const Task& task, Kernel<Task> kernel) noexcept {
  // Pieces of 16,000 multiplications or more, some eight per thread at most.
  int64_t piece = (16384 + task.work() - 1) / task.work();
  if (piece < task.items() / 32) piece = task.items() / 32;
  piece = (piece + Task::TOGETHER - 1) / Task::TOGETHER * Task::TOGETHER;
  helpers().run((task.items() + piece - 1) / piece, [&](int64_t n) noexcept {
    const int64_t last = (n + 1) * piece;
    kernel(task, n * piece, last < task.items() ? last : task.items());
  });
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
    out.set_data(mx::allocator::malloc(out.nbytes()));
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
