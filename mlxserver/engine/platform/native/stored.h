// Keys and values of a cache, as operations have them, an array of float32, or words, scales and biases; and attention to
// them.
#pragma once
#include "operation.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>

#include <tuple>
#include <variant>

using QuantizedArrays = std::tuple<mx::array, mx::array, mx::array>;
using StoredArrays = std::variant<mx::array, QuantizedArrays>;

inline std::vector<mx::array> arrays_of(const StoredArrays& stored) {
  if (auto plain = std::get_if<mx::array>(&stored)) return {*plain};
  const auto& [words, scales, biases] = std::get<QuantizedArrays>(stored);
  return {words, scales, biases};
}

inline StoredArrays stored_arrays(const std::vector<mx::array>& arrays) {
  if (arrays.size() == 1) return arrays[0];
  return QuantizedArrays{arrays[0], arrays[1], arrays[2]};
}

// Format of keys or values. 32 bits: float32.
struct StoredFormat {
  int bits = 32, group = 0;

  bool operator==(const StoredFormat&) const = default;
  bool is_quantized() const { return bits != 32; }
  size_t arrays() const { return is_quantized() ? 3 : 1; }

  // Dimensions of the vectors that an array of this format has.
  int dim(const mx::array& array) const {
    check(array.ndim() == 4);
    return int(int64_t(array.shape(3)) * 32 / bits);
  }

  // Raises invalid_argument unless arrays are [batch, groups, tokens, dim] in a format that has kernels.
  StoredFormat(const std::vector<mx::array>& arrays, int dim) {
    for (const mx::array& array : arrays) check(array.ndim() == 4);
    const mx::array& first = arrays[0];
    mx::Shape shape = first.shape();
    if (arrays.size() == 1) {
      check(is_wide(first) && shape[3] == dim);
      return;
    }
    check(dim > 0 && dim <= Attention::MOST_DIM && arrays[1].shape(3) > 0);
    bits = 32 * shape[3] / dim, group = dim / arrays[1].shape(3);
    check(is_known_format(bits, group) && dim % group == 0);
    check(first.dtype() == mx::uint32 && shape[3] == dim / 32 * bits);
    shape[3] = dim / group;
    for (int n = 1; n < 3; n++) check(is_wide(arrays[n]) && arrays[n].shape() == shape);
  }
};

// Keys or values whose tokens lie below each other, at least within a group.
inline Stored::Part by_group(const mx::array& x, mx::cpu::CommandEncoder& encoder) {
  const bool is_ordered = x.strides(3) == 1 && x.strides(2) == x.shape(3);
  const mx::array own = is_ordered ? x : in_rows(x, encoder);
  return {own.data<void>(), {own.strides(0), own.strides(1)}};
}

// What a kernel reads, of arrays in their order.
inline Stored stored(const StoredFormat& format, const mx::array* arrays, mx::cpu::CommandEncoder& encoder) {
  Stored own{format.bits, format.group, by_group(arrays[0], encoder), {}, {}};
  if (format.is_quantized()) own.scales = by_group(arrays[1], encoder), own.biases = by_group(arrays[2], encoder);
  return own;
}

// Give attention in segments the room for what they come to.
inline void make_room(Attention& task, mx::cpu::CommandEncoder& encoder) {
  if (task.partial_size()) task.partial = room<float>(task.partial_size(), encoder);
}

inline void compute_attention(const Attention& task, Kernel<Attention> attend,
                              Kernel<SegmentedAttention> combine) noexcept {
  compute(task, attend);
  if (task.partial) compute(SegmentedAttention{task}, combine);
}
