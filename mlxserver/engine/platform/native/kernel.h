// The interface between the kernels, which are compiled once per instruction set, and the operations, which choose one of
// them. A task is what a kernel computes: items(), of work() multiplications each. Arrays are row-contiguous unless there
// are strides, in elements.
#pragma once
#include "kernel_attention.h"
#include "kernel_functions.h"
#include "kernel_logits.h"
#include "kernel_products.h"
#include "kernel_recurrence.h"

// Items that a thread takes together: a multiple of this.
template <typename Task>
constexpr int64_t together() {
  if constexpr (requires { Task::TOGETHER; }) return Task::TOGETHER;
  return 1;
}

// Compute items from `first` to before `last`: outputs, rows or groups.
template <typename Task>
using Kernel = void (*)(const Task&, int64_t first, int64_t last) noexcept;

// All kernels and their tasks, for an instruction set.
#define KERNELS(X, LEVEL) \
  X(quantized, Quantized, LEVEL) \
  X(dense, Dense, LEVEL) \
  X(columns, Columns, LEVEL) \
  X(spread, Spread, LEVEL) \
  X(norm, Norm, LEVEL) \
  X(gate, Gate, LEVEL) \
  X(sum, Sum, LEVEL) \
  X(rotation, Rotation, LEVEL) \
  X(attention, Attention, LEVEL) \
  X(combine, SegmentedAttention, LEVEL) \
  X(quantize, Quantization, LEVEL) \
  X(dequantize, Dequantization, LEVEL) \
  X(layer_norm, LayerNorm, LEVEL) \
  X(gelu, Gelu, LEVEL) \
  X(swish, Swish, LEVEL) \
  X(block_attention, BlockAttention, LEVEL) \
  X(draw, Draw, LEVEL) \
  X(penalty, Penalty, LEVEL) \
  X(mask, Mask, LEVEL) \
  X(top, Top, LEVEL) \
  X(log_sum, LogSum, LEVEL) \
  X(gates, Gates, LEVEL) \
  X(recurrence, Recurrence, LEVEL)

#define DECLARED(KERNEL, TASK, LEVEL) void KERNEL##_##LEVEL(const TASK&, int64_t first, int64_t last) noexcept;
extern "C" {
KERNELS(DECLARED, portable)
KERNELS(DECLARED, avx2)
KERNELS(DECLARED, avx512)
}
#undef DECLARED
