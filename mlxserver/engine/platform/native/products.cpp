// Products of float32 rows with weights, quantized or not, and with those of an expert per row.
#include "product_tasks.h"

#include <cstring>

namespace {

Product product_of(const mx::array& x, int64_t outputs, mx::array& out) {
  const int64_t width = x.shape(-1), rows = int64_t(x.size()) / width;
  return {x.data<float>(), nullptr, nullptr, out.data<float>(), rows, width, outputs};
}

Quantized task_of(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
                  mx::array& out, int bits, int group) {
  return {product_of(x, words.shape(-2), out), words.data<uint32_t>(), scales.data<void>(), biases.data<void>(),
          bits, group, type_of(scales)};
}

Dense task_of(const mx::array& x, const mx::array& weight, mx::array& out) {
  return {product_of(x, weight.shape(-2), out), weight.data<void>(), type_of(weight)};
}

// A product whose rows are arranged before it.
template <typename Task>
class ArrangedProduct : public Operation<Task> {
 public:
  ArrangedProduct(const Level& level, Kernel<Task> kernel) : Operation<Task>(kernel), arranging_(level) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    allocate(out);
    auto& encoder = mx::cpu::get_command_encoder(this->stream());
    const Task task = this->task(inputs, out, encoder);
    const int64_t size = room_at_once(task, arranging_);
    float* arranged = size ? room<float>(size, encoder) : nullptr;
    encoder.dispatch([task, arranged, arranging = arranging_, kernel = this->kernel_] {
      compute_arranged(task, arranging, arranged, kernel);
    });
  }

 private:
  Arranging arranging_;
};

// A product with quantized weights, on top of how it is computed.
template <typename Base>
class WithFormat : public Base {
 public:
  template <typename... Others>
  WithFormat(const Level& level, int bits, int group, Others... others)
      : Base(level, level.quantized, others...), bits_(bits), group_(group) {}

  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const WithFormat&>(other);
    return Base::is_equivalent(other) && bits_ == same.bits_ && group_ == same.group_;
  }

 protected:
  Quantized task(const std::vector<mx::array>& inputs, mx::array& out, mx::cpu::CommandEncoder& encoder) const override {
    return task_of(in_rows(inputs[0], encoder), inputs[1], inputs[2], inputs[3], out, bits_, group_);
  }

 private:
  int bits_, group_;
};

class QuantizedProduct : public WithFormat<ArrangedProduct<Quantized>> {
 public:
  using WithFormat::WithFormat;

  const char* name() const override { return "QuantizedProduct"; }
};

class DenseProduct : public ArrangedProduct<Dense> {
 public:
  explicit DenseProduct(const Level& level) : ArrangedProduct(level, level.dense) {}

  const char* name() const override { return "DenseProduct"; }

 protected:
  Dense task(const std::vector<mx::array>& inputs, mx::array& out, mx::cpu::CommandEncoder& encoder) const override {
    Dense task = task_of(in_rows(inputs[0], encoder), inputs[1], out);
    if (inputs.size() > 2) task.bias = inputs[2].data<float>();
    return task;
  }
};

int64_t bytes(int type) { return type == 0 ? 4 : 2; }

// The product with the weights of an expert, of one with those of the first.
Dense of_expert(Dense product, int64_t expert) {
  product.weight = static_cast<const char*>(product.weight) +
                   expert * product.outputs * product.inputs * bytes(product.type);
  return product;
}

Quantized of_expert(Quantized product, int64_t expert) {
  const int64_t scales = expert * product.outputs * (product.inputs / product.group) * bytes(product.type);
  product.words += expert * product.outputs * product.inputs * product.bits / 32;
  product.scales = static_cast<const char*>(product.scales) + scales;
  product.biases = static_cast<const char*>(product.biases) + scales;
  return product;
}

// The expert of each row, `each` rows per index. What is no expert's number is taken for the last one's.
struct Choice {
  const uint32_t* indices;
  int64_t each, experts;
  int64_t operator()(int64_t row) const { return std::min<int64_t>(indices[row / each], experts - 1); }
};

// Rows of one expert that lie together, product by product.
template <typename Task>
void compute_runs(const Task& all, const Choice& expert_of, const Arranging& arranging, float* arranged,
                  Kernel<Task> kernel) noexcept {
  for (int64_t row = 0, end; row < all.rows; row = end) {
    for (end = row + 1; end < all.rows && expert_of(end) == expert_of(row);) end++;
    Task own = of_expert(all, expert_of(row));
    own.take(row, end - row);
    compute_arranged(own, arranging, arranged, kernel);
  }
}

// Room for rows in the order of their experts.
struct Sorted {
  float *x, *out;
  int64_t* rows;      // their numbers in the product
  uint32_t* experts;  // likewise
};

template <typename Task>
void compute_sorted(const Task& all, const Choice& expert_of, const Sorted& sorted, const Arranging& arranging,
                    float* arranged, Kernel<Task> kernel) noexcept {
  int64_t n = 0;
  for (int64_t expert = 0; expert < expert_of.experts && n < all.rows; expert++)
    for (int64_t row = 0; row < all.rows; row++)
      if (expert_of(row) == expert) {
        std::memcpy(sorted.x + n * all.inputs, all.x + row * all.inputs, all.inputs * sizeof(float));
        sorted.rows[n] = row, sorted.experts[n++] = uint32_t(expert);
      }
  Task ordered = all;
  ordered.x = sorted.x, ordered.out = sorted.out;
  compute_runs(ordered, Choice{sorted.experts, 1, expert_of.experts}, arranging, arranged, kernel);
  for (n = 0; n < all.rows; n++)
    std::memcpy(all.out + sorted.rows[n] * all.outputs, sorted.out + n * all.outputs, all.outputs * sizeof(float));
}

// A product whose weights have one dimension more, of which each row takes what its index says.
template <typename Task>
class Experts : public Operation<Task> {
 public:
  Experts(const Level& level, Kernel<Task> kernel, bool is_sorted)
      : Operation<Task>(kernel), arranging_(level), is_sorted_(is_sorted) {}

  const char* name() const override { return "ExpertProduct"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return Operation<Task>::is_equivalent(other) && is_sorted_ == static_cast<const Experts&>(other).is_sorted_;
  }

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    allocate(out);
    auto& encoder = mx::cpu::get_command_encoder(this->stream());
    const mx::array& indices = inputs.back();
    const Task all = this->task(inputs, out, encoder);
    const Choice chosen{indices.data<uint32_t>(), all.rows / int64_t(indices.size()), inputs[1].shape(0)};
    const int64_t size = room_at_once(all, arranging_);  // of all rows, or of fewer in a run
    float* arranged = size ? room<float>(size, encoder) : nullptr;
    if (is_sorted_) {
      encoder.dispatch([=, arranging = arranging_, kernel = this->kernel_] {
        compute_runs(all, chosen, arranging, arranged, kernel);
      });
      return;
    }
    const Sorted sorted{room<float>(all.rows * all.inputs, encoder), room<float>(all.rows * all.outputs, encoder),
                        room<int64_t>(all.rows, encoder), room<uint32_t>(all.rows, encoder)};
    encoder.dispatch([=, arranging = arranging_, kernel = this->kernel_] {
      compute_sorted(all, chosen, sorted, arranging, arranged, kernel);
    });
  }

 private:
  Arranging arranging_;
  bool is_sorted_;
};

class DenseExperts : public Experts<Dense> {
 public:
  DenseExperts(const Level& level, bool is_sorted) : Experts(level, level.dense, is_sorted) {}

 protected:
  Dense task(const std::vector<mx::array>& inputs, mx::array& out, mx::cpu::CommandEncoder& encoder) const override {
    return task_of(in_rows(inputs[0], encoder), inputs[1], out);
  }
};

using QuantizedExperts = WithFormat<Experts<Quantized>>;

mx::array product(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
                  int group, int bits, const std::string& name) {
  check_format(words, scales, biases, group, bits);
  const int outputs = words.ndim() == 2 ? words.shape(0) : 0, inputs = x.ndim() ? x.shape(-1) : 0;
  if (!outputs || !inputs || !fits(words, scales, biases, inputs, group, bits))
    throw std::invalid_argument("the shapes of the product do not fit");
  auto shape = x.shape();
  shape.back() = outputs;
  if (!x.size()) return mx::zeros(shape, mx::float32, cpu());
  std::vector<mx::array> arrays{mx::astype(x, mx::float32, cpu()), in_order(words), in_order(scales), in_order(biases)};
  auto operation = std::make_shared<QuantizedProduct>(level(name), bits, group);
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

// Inputs and indices of a product with experts, with the same leading dimensions, and the shape of the product.
struct Rows {
  mx::array x, indices;
  mx::Shape shape;
};

Rows rows_of(const mx::array& x, const mx::array& indices, int outputs) {
  auto batch = mx::broadcast_shapes(mx::Shape(x.shape().begin(), x.shape().end() - 2), indices.shape());
  auto chosen = mx::contiguous(mx::broadcast_to(mx::astype(indices, mx::uint32, cpu()), batch, cpu()), false, cpu());
  mx::Shape own = batch, shape = batch;
  own.insert(own.end(), {x.shape(-2), x.shape(-1)});
  shape.insert(shape.end(), {x.shape(-2), outputs});
  return {mx::broadcast_to(mx::astype(x, mx::float32, cpu()), own, cpu()), chosen, shape};
}

mx::array expert_product(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
                         const mx::array& indices, int group, int bits, bool is_sorted, const std::string& name) {
  check_format(words, scales, biases, group, bits);
  const int inputs = x.ndim() > 1 ? x.shape(-1) : 0, experts = words.ndim() == 3 ? words.shape(0) : 0;
  const int outputs = experts ? words.shape(1) : 0;
  const mx::Shape groups{experts, outputs, inputs / group};
  if (!outputs || !inputs || inputs % group || words.shape(2) != inputs / 32 * bits || scales.shape() != groups ||
      biases.shape() != groups)
    throw std::invalid_argument("the shapes of the product do not fit");
  const Rows rows = rows_of(x, indices, outputs);
  if (!rows.x.size()) return mx::zeros(rows.shape, mx::float32, cpu());
  std::vector<mx::array> arrays{rows.x, in_order(words), in_order(scales), in_order(biases), rows.indices};
  auto operation = std::make_shared<QuantizedExperts>(level(name), bits, group, is_sorted);
  return mx::array(rows.shape, mx::float32, operation, arrays);
}

mx::array expert_dense(const mx::array& x, const mx::array& weight, const mx::array& indices, bool is_sorted,
                       const std::string& name) {
  if (!is_float(weight.dtype())) throw std::invalid_argument("weights of this type have no kernel");
  const int inputs = x.ndim() > 1 ? x.shape(-1) : 0, outputs = weight.ndim() == 3 ? weight.shape(1) : 0;
  if (!outputs || !inputs || !weight.shape(0) || weight.shape(2) != inputs)
    throw std::invalid_argument("the shapes of the product do not fit");
  const Rows rows = rows_of(x, indices, outputs);
  if (!rows.x.size()) return mx::zeros(rows.shape, mx::float32, cpu());
  std::vector<mx::array> arrays{rows.x, in_order(weight), rows.indices};
  return mx::array(rows.shape, mx::float32, std::make_shared<DenseExperts>(level(name), is_sorted), arrays);
}

}  // namespace

void add_products(nb::module_& m) {
  m.def("product", &product, nb::arg("x"), nb::arg("words"), nb::arg("scales"), nb::arg("biases"), nb::arg("group"),
        nb::arg("bits"), nb::arg("level") = "");
  m.def("dense", &dense, nb::arg("x"), nb::arg("weight"), nb::arg("bias") = nb::none(), nb::arg("level") = "");
  m.def("expert_product", &expert_product, nb::arg("x"), nb::arg("words"), nb::arg("scales"), nb::arg("biases"),
        nb::arg("indices"), nb::arg("group"), nb::arg("bits"), nb::arg("is_sorted") = false, nb::arg("level") = "");
  m.def("expert_dense", &expert_dense, nb::arg("x"), nb::arg("weight"), nb::arg("indices"),
        nb::arg("is_sorted") = false, nb::arg("level") = "");
}
