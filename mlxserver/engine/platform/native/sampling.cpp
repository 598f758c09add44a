// Functions of the logits of a step, [batch, vocab]: penalties, masks, likeliest tokens, draws.
#include "operation.h"

namespace {

using Arrays = std::vector<mx::array>;
using Encoder = mx::cpu::CommandEncoder;

Draw draw_task(const Arrays& inputs, mx::array& out, Encoder& encoder) {
  const mx::array logits = in_rows(inputs[0], encoder);
  const int64_t rows = logits.shape(0);
  Draw task{logits.data<float>(), nullptr, nullptr, nullptr, out.data<uint32_t>(), rows, logits.shape(1)};
  if (inputs.size() > 1) {
    task.settings = in_rows(inputs[1], encoder).data<float>();
    task.uniforms = in_rows(inputs[2], encoder).data<float>();
    task.weights = room<float>(rows * task.space(), encoder);
  }
  return task;
}

Penalty penalty_task(const Arrays& inputs, mx::array& out, Encoder& encoder) {
  const mx::array logits = in_rows(inputs[0], encoder), generated = in_rows(inputs[1], encoder);
  const mx::array penalties = in_rows(inputs[3], encoder);
  return {logits.data<float>(), generated.data<float>(), inputs[2].data<uint8_t>(), penalties.data<float>(),
          out.data<float>(),    logits.shape(0),         logits.shape(1)};
}

Mask mask_task(const Arrays& inputs, mx::array& out, Encoder& encoder) {
  const mx::array logits = in_rows(inputs[0], encoder);
  return {logits.data<float>(), inputs[1].data<uint8_t>(), out.data<float>(), logits.shape(0), logits.shape(1),
          inputs[1].shape(1)};
}

Top top_task(const Arrays& inputs, mx::array& out, Encoder& encoder) {
  const mx::array x = in_rows(inputs[0], encoder);
  return {x.data<float>(), out.data<uint32_t>(), x.shape(0), x.shape(1), out.shape(1)};
}

LogSum log_sum_task(const Arrays& inputs, mx::array& out, Encoder& encoder) {
  const mx::array x = in_rows(inputs[0], encoder);
  return {x.data<float>(), out.data<float>(), x.shape(0), x.shape(1)};
}

template <typename Task, Task (*make)(const Arrays&, mx::array&, Encoder&)>
class LogitsOperation : public Operation<Task> {
 public:
  using Operation<Task>::Operation;
  const char* name() const override { return "NativeLogits"; }

 protected:
  Task task(const Arrays& inputs, mx::array& out, Encoder& encoder) const override {
    return make(inputs, out, encoder);
  }
};

// An array that is computed from others, of which the first has the logits.
template <typename Task, Task (*make)(const Arrays&, mx::array&, Encoder&)>
mx::array computed(const mx::Shape& shape, mx::Dtype dtype, Kernel<Task> kernel, const Arrays& arrays) {
  const mx::array& logits = arrays[0];
  check(logits.dtype() == mx::float32 && logits.ndim() == 2 && (logits.shape(1) || !logits.shape(0)));
  for (int64_t size : shape)
    if (!size) return mx::zeros(shape, dtype, cpu());
  return mx::array(shape, dtype, std::make_shared<LogitsOperation<Task, make>>(kernel), arrays);
}

bool is_wide(const mx::array& array, const mx::Shape& shape) {
  return array.dtype() == mx::float32 && array.shape() == shape;
}

mx::array draw(const mx::array& logits, const mx::array& settings, const mx::array& uniforms, const std::string& name) {
  check(logits.ndim() == 2 && is_wide(settings, {logits.shape(0), 4}) && is_wide(uniforms, {logits.shape(0), 1}));
  return computed<Draw, draw_task>({logits.shape(0)}, mx::uint32, level(name).draw, {logits, settings, uniforms});
}

mx::array argmax(const mx::array& logits, const std::string& name) {
  check(logits.ndim() == 2);
  return computed<Draw, draw_task>({logits.shape(0)}, mx::uint32, level(name).draw, {logits});
}

mx::array penalize(const mx::array& logits, const mx::array& generated, const mx::array& prompted,
                   const mx::array& penalties, const std::string& name) {
  check(logits.ndim() == 2 && is_wide(generated, logits.shape()) && is_wide(penalties, {logits.shape(0), 3}) &&
        prompted.dtype() == mx::bool_ && prompted.shape() == logits.shape());
  return computed<Penalty, penalty_task>(logits.shape(), mx::float32, level(name).penalty,
                                         {logits, generated, mx::contiguous(prompted, false, cpu()), penalties});
}

mx::array mask(const mx::array& logits, const mx::array& allowed, const std::string& name) {
  check(logits.ndim() == 2 && allowed.ndim() == 2 && allowed.dtype() == mx::uint8 &&
        allowed.shape(0) == logits.shape(0) && int64_t(allowed.shape(1)) * 8 >= logits.shape(1));
  return computed<Mask, mask_task>(logits.shape(), mx::float32, level(name).mask,
                                   {logits, mx::contiguous(allowed, false, cpu())});
}

mx::array top(const mx::array& logits, int count, const std::string& name) {
  check(logits.ndim() == 2 && 0 <= count && count <= Top::MOST && count <= logits.shape(1));
  return computed<Top, top_task>({logits.shape(0), count}, mx::uint32, level(name).top, {logits});
}

mx::array log_sum(const mx::array& logits, const std::string& name) {
  check(logits.ndim() == 2);
  return computed<LogSum, log_sum_task>({logits.shape(0), 1}, mx::float32, level(name).log_sum, {logits});
}

}  // namespace

void add_sampling(nb::module_& m) {
  m.def("draw", &draw, nb::arg("logits"), nb::arg("settings"), nb::arg("uniforms"), nb::arg("level") = "");
  m.def("argmax", &argmax, nb::arg("logits"), nb::arg("level") = "");
  m.def("penalize", &penalize, nb::arg("logits"), nb::arg("generated"), nb::arg("prompted"), nb::arg("penalties"),
        nb::arg("level") = "");
  m.def("mask", &mask, nb::arg("logits"), nb::arg("allowed"), nb::arg("level") = "");
  m.def("top", &top, nb::arg("logits"), nb::arg("count"), nb::arg("level") = "");
  m.def("log_sum", &log_sum, nb::arg("logits"), nb::arg("level") = "");
  m.attr("MOST_TOP") = Top::MOST;
}
