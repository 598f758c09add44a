// Tasks of products, for the operations that have some.
#pragma once
#include "operation.h"

#include <algorithm>
#include <vector>

inline int type_of(const mx::array& weights) {
  return weights.dtype() == mx::float32 ? 0 : weights.dtype() == mx::float16 ? 1 : 2;
}

inline bool is_float(mx::Dtype type) { return type == mx::float32 || type == mx::float16 || type == mx::bfloat16; }

// Weights in the order of their rows, which they nearly always are in.
inline mx::array in_order(const mx::array& weights) {
  const bool is_ordered = weights.is_available() && weights.flags().row_contiguous;
  return is_ordered ? weights : mx::contiguous(weights, false, cpu());
}

inline void check_format(const mx::array& words, const mx::array& scales, const mx::array& biases, int group, int bits) {
  const auto type = scales.dtype();
  const bool is_typed = words.dtype() == mx::uint32 && biases.dtype() == type && is_float(type);
  if (!is_known_format(bits, group) || !is_typed) throw std::invalid_argument("weights of this format have no kernel");
}

// Whether weights of a known format, [outputs, ...], are those of so many inputs.
inline bool fits(const mx::array& words, const mx::array& scales, const mx::array& biases, int inputs, int group,
                 int bits) {
  const mx::Shape groups{words.shape(0), inputs / group};
  return inputs % group == 0 && words.shape(1) == inputs / 32 * bits && scales.shape() == groups &&
         biases.shape() == groups;
}

// What arranges the rows of a product as its kernel reads them: many as columns, few beside quantized weights spread.
struct Arranging {
  Kernel<Columns> columns;
  Kernel<Spread> spread;
  int64_t lanes;

  explicit Arranging(const Level& level) : columns(level.columns), spread(level.spread), lanes(level.lanes) {}

  // Elements of room for so many rows or fewer.
  int64_t size(const Product& p) const {
    const int64_t vectors = vectors_of(p.rows, lanes);
    return vectors < 2 ? 0 : vectors * p.inputs * lanes;
  }

  int64_t size(const Quantized& p) const {
    const int64_t few = std::min(p.rows, Quantized::FEW) * spread_of(p, nullptr).size();
    return std::max(few, size(static_cast<const Product&>(p)));
  }

  void arrange(Product& p, float* room) const noexcept {
    const int64_t vectors = vectors_of(p.rows, lanes);
    if (vectors < 2) return;
    compute(Columns{p.x, room, p.rows, p.inputs, vectors, lanes}, columns);
    p.columns = room;
  }

  void arrange(Quantized& p, float* room) const noexcept {
    if (p.rows > Quantized::FEW) return arrange(static_cast<Product&>(p), room);
    compute(spread_of(p, room), spread);
    p.spread = room;
  }

 private:
  Spread spread_of(const Quantized& p, float* room) const {
    return {p.x, room, p.rows, p.inputs, lanes, p.bits, p.group};
  }
};

// Rows of a product that are arranged and multiplied at once: their columns stay in a second-level cache.
inline int64_t rows_at_once(const Product& p) {
  const int64_t blocks = std::max<int64_t>(1, (int64_t(1) << 18) / p.inputs / Product::ROWS);
  return std::min(p.rows, blocks * Product::ROWS);
}

// Elements of room that compute_arranged() needs for a product or one of fewer rows.
template <typename Task>
int64_t room_at_once(Task product, const Arranging& arranging) {
  product.take(0, rows_at_once(product));
  return arranging.size(product);
}

template <typename Task>
void compute_arranged(const Task& product, const Arranging& arranging, float* room, Kernel<Task> kernel) noexcept {
  const int64_t most = rows_at_once(product);
  for (int64_t row = 0; row < product.rows; row += most) {
    Task own = product;
    own.take(row, std::min(most, product.rows - row));
    arranging.arrange(own, room);
    compute(own, kernel);
  }
}

// A product with weights of either kind.
struct AnyProduct {
  Quantized quantized{};
  Dense dense{};
  bool is_quantized;

  explicit AnyProduct(const Quantized& product) : quantized(product), is_quantized(true) {}
  explicit AnyProduct(const Dense& product) : dense(product), is_quantized(false) {}

  int64_t room(const Arranging& arranging) const {
    return is_quantized ? arranging.size(quantized) : arranging.size(dense);
  }
  void arrange(const Arranging& arranging, float* room) noexcept {
    if (is_quantized) arranging.arrange(quantized, room);
    else arranging.arrange(dense, room);
  }
  // Take what another product of the same rows has arranged, if it reads them likewise.
  bool shares(const AnyProduct& other) noexcept {
    const Quantized& own = other.quantized;
    if (is_quantized != other.is_quantized || (is_quantized && (quantized.bits != own.bits || quantized.group != own.group)))
      return false;
    quantized.columns = own.columns, quantized.spread = own.spread, dense.columns = other.dense.columns;
    return true;
  }
  Pieces pieces() const { return is_quantized ? Pieces(quantized) : Pieces(dense); }
  void run(const Level& level, int64_t first, int64_t last) const noexcept {
    if (is_quantized) level.quantized(quantized, first, last);
    else level.dense(dense, first, last);
  }
};

// Elements of room in which the rows of products are arranged, at least one.
inline int64_t room_of(const std::vector<AnyProduct>& products, const Arranging& arranging) {
  int64_t all = 1;
  for (const AnyProduct& own : products) all += own.room(arranging);
  return all;
}

// Compute products of the same rows, on all threads at once.
inline void compute_products(std::vector<AnyProduct>& products, const Arranging& arranging, float* room,
                             const Level& level) noexcept {
  int64_t total = 0;
  for (size_t n = 0; n < products.size(); n++) {
    if (!n || !products[n].shares(products[n - 1])) {
      products[n].arrange(arranging, room);
      room += products[n].room(arranging);
    }
    total += products[n].pieces().count;
  }
  helpers().run(total, [&](int64_t piece) noexcept {
    for (const AnyProduct& own : products) {
      const Pieces pieces = own.pieces();
      if (piece < pieces.count) return own.run(level, pieces.first(piece), pieces.first(piece + 1));
      piece -= pieces.count;
    }
  });
}
