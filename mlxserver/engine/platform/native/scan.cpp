// Layers whose state is a matrix per head: Mamba-2 and the gated delta rule.
#include "operation.h"

#include <nanobind/stl/pair.h>

namespace {

using Arrays = std::vector<mx::array>;
using Encoder = mx::cpu::CommandEncoder;

// The parts of a projection are read where they are, if their last dimension is contiguous.
mx::array in_place(const mx::array& x, Encoder& encoder) { return x.strides(3) == 1 ? x : in_rows(x, encoder); }

struct Settings {
  Rule rule;
  float least, most;
  bool has_state = false, has_mask = false;

  bool operator==(const Settings&) const = default;
};

// Inputs: keys, queries, values, decays, rates, biases, weights of Mamba or factors of the delta rule, state, mask.
class Scan : public mx::Primitive {
 public:
  Scan(const Settings& settings, const Level& level)
      : mx::Primitive(cpu()), settings_(settings), gates_(level.gates), kernel_(level.recurrence) {}
  const char* name() const override { return "NativeScan"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& same = static_cast<const Scan&>(other);
    return settings_ == same.settings_ && kernel_ == same.kernel_;
  }
  void eval_gpu(const Arrays&, Arrays&) override { throw std::runtime_error("this operation is for a CPU"); }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    allocate(outputs[0]);
    Recurrence task = shape_of(inputs, encoder);
    task.out = outputs[0].data<float>();
    task.state = state(inputs, outputs[1], encoder);
    task.state_out = outputs[1].data<float>();
    const Gates gates = this->gates(inputs, task.batch * task.tokens, encoder);
    task.decays = gates.decays_out;
    task.factors = gates.factors_out;
    encoder.dispatch([gates, task, gates_kernel = gates_, kernel = kernel_] {
      compute(gates, gates_kernel);
      compute(task, kernel);
    });
  }

 private:
  Recurrence shape_of(const Arrays& inputs, Encoder& encoder) const {
    const mx::array keys = in_place(inputs[0], encoder), queries = in_place(inputs[1], encoder);
    const mx::array values = in_place(inputs[2], encoder);
    Recurrence task{};
    task.keys = keys.data<float>();
    task.queries = queries.data<float>();
    task.values = values.data<float>();
    if (settings_.rule == Rule::MAMBA) task.weights = in_rows(inputs[6], encoder).data<float>();
    if (settings_.has_mask) task.mask = inputs.back().data<bool>();
    task.batch = values.shape(0), task.tokens = values.shape(1);
    task.heads = values.shape(2), task.dim = values.shape(3);
    task.groups = keys.shape(2), task.key_dim = keys.shape(3);
    std::copy_n(keys.strides().begin(), 3, task.key_strides);
    std::copy_n(queries.strides().begin(), 3, task.query_strides);
    std::copy_n(values.strides().begin(), 3, task.value_strides);
    task.rule = settings_.rule;
    task.is_per_key = inputs[3].ndim() == 4;
    return task;
  }

  Gates gates(const Arrays& inputs, int64_t tokens, Encoder& encoder) const {
    const mx::array decays = in_rows(inputs[3], encoder), rates = in_rows(inputs[4], encoder);
    const mx::array biases = in_rows(inputs[5], encoder);
    const int64_t heads = decays.shape(2), width = decays.ndim() == 4 ? decays.shape(3) : 1;
    const float* factors = settings_.rule == Rule::MAMBA ? nullptr : in_rows(inputs[6], encoder).data<float>();
    return {decays.data<float>(),
            factors,
            rates.data<float>(),
            biases.data<float>(),
            room<float>(tokens * heads * width, encoder),
            room<float>(tokens * heads, encoder),
            tokens,
            heads,
            width,
            settings_.rule,
            settings_.least,
            settings_.most};
  }

  // The state before the tokens; what it is after them is put into its memory, if that has no other use.
  const float* state(const Arrays& inputs, mx::array& out, Encoder& encoder) const {
    if (!settings_.has_state) {
      allocate(out);
      return nullptr;
    }
    const mx::array& state = inputs[7];
    if (state.is_donatable() && state.flags().row_contiguous) {
      out.copy_shared_buffer(state);
      return out.data<float>();
    }
    allocate(out);
    return in_rows(state, encoder).data<float>();
  }

  Settings settings_;
  Kernel<Gates> gates_;
  Kernel<Recurrence> kernel_;
};

using Optional = std::optional<mx::array>;
using Pair = std::pair<mx::array, mx::array>;

// inputs: without state and mask.
Pair scanned(Arrays inputs, const Optional& state, const Optional& mask, Settings settings, const std::string& name) {
  for (const mx::array& input : inputs) check(is_wide(input));
  const mx::array keys = inputs[0], values = inputs[2];
  check(keys.ndim() == 4 && keys.shape() == inputs[1].shape() && values.ndim() == 4 && values.size());
  const int batch = values.shape(0), tokens = values.shape(1), heads = values.shape(2), key_dim = keys.shape(3);
  check(keys.shape(0) == batch && keys.shape(1) == tokens && keys.shape(2) && heads % keys.shape(2) == 0);
  check(key_dim && key_dim % Recurrence::KEYS == 0 && key_dim <= Recurrence::MOST_KEY);
  mx::Shape gates{batch, tokens, heads}, biases{heads};
  if (inputs[3].ndim() == 4) gates.push_back(key_dim), biases.push_back(key_dim);
  check(inputs[3].shape() == gates && inputs[5].shape() == biases && inputs[4].size() == size_t(heads));
  const mx::Shape shape{batch, heads, values.shape(3), key_dim};
  check(!state || (is_wide(*state) && state->shape() == shape));
  check(!mask || (mask->dtype() == mx::bool_ && mask->shape() == mx::Shape{batch, tokens}));
  if (state) inputs.push_back(*state);
  if (mask) inputs.push_back(mx::contiguous(*mask, false, cpu()));
  settings.has_state = state.has_value(), settings.has_mask = mask.has_value();
  auto operation = std::make_shared<Scan>(settings, level(name));
  Arrays out = mx::array::make_arrays({values.shape(), shape}, {mx::float32, mx::float32}, operation, inputs);
  return {out[0], out[1]};
}

Pair mamba(const mx::array& x, const mx::array& keys, const mx::array& queries, const mx::array& steps,
           const mx::array& rates, const mx::array& biases, const mx::array& weights, float least, float most,
           const Optional& state, const Optional& mask, const std::string& name) {
  check(steps.ndim() == 3 && weights.shape() == mx::Shape{steps.shape(2)});
  const Settings settings{Rule::MAMBA, least, most};
  return scanned({keys, queries, x, steps, rates, biases, weights}, state, mask, settings, name);
}

Pair gated_delta(const mx::array& queries, const mx::array& keys, const mx::array& values, const mx::array& decays,
                 const mx::array& factors, const mx::array& rates, const mx::array& biases, float most,
                 std::optional<float> bound, const Optional& state, const Optional& mask, const std::string& name) {
  check(values.ndim() == 4 && factors.shape() == mx::Shape{values.shape(0), values.shape(1), values.shape(2)});
  const Settings settings{bound ? Rule::BOUNDED_DELTA : Rule::DELTA, bound.value_or(0.0f), most};
  return scanned({keys, queries, values, decays, rates, biases, factors}, state, mask, settings, name);
}

}  // namespace

void add_recurrences(nb::module_& m) {
  m.def("mamba", &mamba, nb::arg("x"), nb::arg("keys"), nb::arg("queries"), nb::arg("steps"), nb::arg("rates"),
        nb::arg("biases"), nb::arg("weights"), nb::arg("least"), nb::arg("most"), nb::arg("state").none(),
        nb::arg("mask").none(), nb::arg("level") = "");
  m.def("gated_delta", &gated_delta, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("decays"),
        nb::arg("factors"), nb::arg("rates"), nb::arg("biases"), nb::arg("most"), nb::arg("bound").none(),
        nb::arg("state").none(), nb::arg("mask").none(), nb::arg("level") = "");
}
