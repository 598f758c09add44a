// A decoder layer of a step, of the form that Llama and Qwen share, in few operations. A step of one sequence has some nine
// hundred small operations otherwise, and MLX spends on them a third of its time.
#include "decoder_operations.h"

#include <nanobind/stl/vector.h>

namespace {

// Keys, values, offsets and number of rows of a class of slots.
using Slots = std::tuple<StoredArrays, StoredArrays, mx::array, int>;

void check_norms(const Arrays& norms, int width, int dim) {
  check(norms.size() == 2 || norms.size() == 4);
  for (size_t n = 0; n < norms.size(); n++)
    check(is_wide(norms[n]) && norms[n].shape() == mx::Shape{n < 2 ? width : dim});
}

void check_angles(const mx::array& cosines, const mx::array& sines, const Sizes& sizes) {
  check(is_wide(cosines) && is_wide(sines) && cosines.ndim() && sines.ndim());
  const int64_t own = cosines.shape(0), angles = sizes.length * sizes.dim / 2;
  check((own == 1 || own == sizes.batch) && own == sines.shape(0) && cosines.size() == size_t(own * angles) &&
        sines.size() == 2 * cosines.size());
}

// Number of rows of all classes. Raises invalid_argument unless all keys and values have these sizes.
int64_t rows_of(const std::vector<Slots>& slots, const Sizes& sizes) {
  int64_t rows = 0;
  for (const auto& [own_keys, own_values, offsets, count] : slots) {
    const Arrays keys = arrays_of(own_keys), values = arrays_of(own_values);
    check(StoredFormat(keys, sizes.dim) == sizes.format && StoredFormat(values, sizes.dim) == sizes.format &&
          keys[0].shape() == values[0].shape() && keys[0].shape(1) == sizes.groups && offsets.dtype() == mx::int32 &&
          offsets.size() >= size_t(count) && count <= keys[0].shape(0));
    rows += count;
  }
  return rows;
}

// What a layer's attention takes. inputs: those of AttentionInputs, but for the layers'.
mx::array attention_inputs(Arrays inputs, const std::vector<Layer>& layers, const Sizes& sizes, float eps,
                           bool has_norms, const Level& level) {
  std::vector<Linear> own;
  for (int n = 0; n < 3; n++) own.emplace_back(layers[n], inputs[0].shape(2), inputs);
  check(own[0].outputs == sizes.query() && own[1].outputs == sizes.key() && own[2].outputs == sizes.key());
  auto operation = std::make_shared<AttentionInputs>(sizes, eps, own, has_norms, level);
  return mx::array({int(sizes.size())}, mx::float32, operation, inputs);
}

// Keys or values of a class, with those of its rows written to them, which are `first` and the next ones of the layer's.
StoredArrays written(const StoredArrays& slots, bool is_value, const mx::array& attended, const mx::array& offsets,
                     const Sizes& sizes, int64_t first, int64_t count) {
  Arrays arrays = arrays_of(slots);
  for (size_t part = 0; part < arrays.size(); part++) {
    auto operation = std::make_shared<SlotWrite>(sizes, part, first, count, is_value);
    const mx::array before = arrays[part];
    arrays[part] = mx::array(before.shape(), before.dtype(), operation, {before, attended, offsets});
  }
  return stored_arrays(arrays);
}

// The layers from the output of the attention on, whose arrays are added to the inputs.
std::vector<Linear> layers_behind(const std::vector<Layer>& layers, const Sizes& sizes, int width, Arrays& inputs) {
  std::vector<Linear> own;
  own.emplace_back(layers[3], int(sizes.query()), inputs);
  for (int n = 4; n < 6; n++) own.emplace_back(layers[n], width, inputs);
  own.emplace_back(layers[6], own[1].outputs, inputs);
  check(own[0].outputs == width && own[1].outputs == own[2].outputs && own[3].outputs == width);
  return own;
}

// A layer of a step. x [batch, length, width]; layers: those of queries, keys, values and the output, gate, up and down;
// norms: that of the attention's input, of the rest's, of queries and of keys if there are some. Returns the layer's
// output, and the keys and values of each class.
std::tuple<mx::array, std::vector<StoredArrays>, std::vector<StoredArrays>> decoder_layer(
    const mx::array& x, const std::vector<Layer>& layers, const Arrays& norms, const mx::array& cosines,
    const mx::array& sines, const std::vector<Slots>& slots, int heads, int groups, int dim, float scale, float eps,
    const std::string& name) {
  const Level level = ::level(name);
  check(is_wide(x) && x.ndim() == 3 && layers.size() == 7 && !slots.empty());
  const Sizes sizes{heads, groups, dim, x.shape(0), x.shape(1), StoredFormat(arrays_of(std::get<0>(slots[0])), dim)};
  check(sizes.rows() && rows_of(slots, sizes) == sizes.batch && heads % groups == 0 && dim % 2 == 0);
  const int width = x.shape(2);
  check_norms(norms, width, dim);
  check_angles(cosines, sines, sizes);

  Arrays inputs{x, cosines, sines, in_order(norms[0])};
  for (size_t n = 2; n < norms.size(); n++) inputs.push_back(in_order(norms[n]));
  const mx::array attended = attention_inputs(inputs, layers, sizes, eps, norms.size() > 2, level);

  Arrays rest{x, attended, in_order(norms[1])};
  const std::vector<Linear> own = layers_behind(layers, sizes, width, rest);
  std::vector<int> batches;
  std::vector<StoredArrays> keys, values;
  int64_t first = 0;
  for (const auto& [own_keys, own_values, offsets, count] : slots) {
    keys.push_back(written(own_keys, false, attended, offsets, sizes, first, count));
    values.push_back(written(own_values, true, attended, offsets, sizes, first, count));
    for (const StoredArrays* stored : {&keys.back(), &values.back()})
      for (const mx::array& array : arrays_of(*stored)) rest.push_back(array);
    rest.push_back(offsets);
    batches.push_back(count);
    first += count;
  }
  auto operation = std::make_shared<AttentionAndRest>(sizes, scale, eps, own, batches, level);
  return {mx::array(x.shape(), mx::float32, operation, rest), keys, values};
}

}  // namespace

void add_decoder(nb::module_& m) {
  m.def("decoder_layer", &decoder_layer, nb::arg("x"), nb::arg("layers"), nb::arg("norms"), nb::arg("cosines"),
        nb::arg("sines"), nb::arg("slots"), nb::arg("heads"), nb::arg("groups"), nb::arg("dim"), nb::arg("scale"),
        nb::arg("eps"), nb::arg("level") = "");
}
