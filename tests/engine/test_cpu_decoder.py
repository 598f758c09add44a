"""Decoder layers in few operations give what their own code gives."""

from mlxserver.engine.mlx import mx, nn

import pytest
from mlx_lm.models import llama, qwen2, qwen3

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.quantized import KVFormat
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.loading.kv_format import quantize_kv
from mlxserver.engine.platform import cpu_decoder, cpu_layers, cpu_stored
from mlxserver.engine.platform.native.extension import native
from tests.support.architectures import BASE, CONFIGS, random_model
from tests.support.layer_steps import filled, steps

pytestmark = pytest.mark.skipif(not native(), reason="there are no native kernels")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "llama": (llama, {"num_hidden_layers": 2}),
    "llama, biased": (llama, {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
    "llama 3": (llama, {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "llama, one key head": (llama, {"num_key_value_heads": 1, "hidden_size": 96, "head_dim": 24}),
    "qwen2": (qwen2, {"num_hidden_layers": 3, "head_dim": 16}),
    "qwen3": (qwen3, {"head_dim": 32}),
}
FORMATS = {"float32": (0, 0), "bfloat16": (16, 0), "4 bits": (4, 32), "8 bits": (8, 32), "mixed": (-1, 32)}


def made(kind, settings, weights):
    """A model of random weights, with the layers of a loaded one."""
    mx.random.seed(3)
    own = BASE | settings | {"model_type": kind.__name__.rpartition(".")[2]}
    model = kind.Model(kind.ModelArgs.from_dict(own))
    bits, group = weights
    if bits == 16:
        model.set_dtype(mx.bfloat16)
    elif bits == -1:
        nn.quantize(model, group, 8, class_predicate=lambda name, layer: name.endswith(("v_proj", "down_proj")))
        nn.quantize(model, group, 4, class_predicate=lambda name, layer: name.endswith(("q_proj", "gate_proj")))
    elif bits:
        nn.quantize(model, group, bits)
    cpu_stored.replace_layers(model)
    cpu_layers.replace_functions()
    cpu_layers.replace_layers(model)
    cpu_decoder.replace_layers(model)
    mx.eval(model.parameters())
    return model


class Counting:
    """The native kernels, and how many layers they have computed."""

    layers = 0

    def decoder_layer(self, *arguments):
        self.layers += 1
        return native().decoder_layer(*arguments)


@pytest.fixture
def counting(monkeypatch):
    """The kernels of a model of any number of layers."""
    kernels = Counting()
    monkeypatch.setattr(cpu_decoder, "_LEAST", 1)
    monkeypatch.setattr(cpu_decoder, "native", lambda: kernels)
    return kernels


def computed_by_their_own_code(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(cpu_decoder, "_MOST", 0)
        return steps(*arguments)


def assert_logits_of_their_own_code(model, lengths, counting, monkeypatch):
    """Every layer of every step was computed by the kernel, with the logits of its own code."""
    logits = steps(model, lengths)
    assert counting.layers == 6 * len(model.layers)  # one step is built, not computed, before there are slots
    counting.layers = 0
    expected = computed_by_their_own_code(monkeypatch, model, lengths)
    assert not counting.layers
    if len(lengths) == 1:
        assert all(map(mx.array_equal, logits, expected))
    # Their own code attends to what is masked, too, up to the longest of a class: that is another order of additions.
    assert all(mx.allclose(one, other, rtol=1e-5, atol=2e-6) for one, other in zip(logits, expected, strict=True))


@pytest.mark.parametrize("weights", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", [[1], [70], [5, 300, 6, 700, 40]], ids=str)
def test_logits_are_those_of_the_layers_own_code(shape, weights, lengths, counting, monkeypatch):
    model = made(*shape, weights)
    assert_logits_of_their_own_code(model, lengths, counting, monkeypatch)


def test_many_tokens_of_a_sequence_are_computed_by_the_layers_own_code(counting):
    model = made(*SHAPES["llama"], FORMATS["float32"])
    steps(model, [5, 40], verified=cpu_decoder._MOST + 1)
    assert counting.layers == 5 * len(model.layers)


@pytest.mark.parametrize("kv", [KVFormat(8, 32), KVFormat(4, 64)], ids=str)
@pytest.mark.parametrize("lengths", [[70], [5, 300, 6, 700, 40]], ids=str)
def test_logits_with_a_quantised_kv_cache_are_those_of_the_layers_own_code(kv, lengths, counting, monkeypatch):
    model = made(llama, {"num_attention_heads": 4, "head_dim": 64}, FORMATS["float32"])
    quantize_kv(model, kv)
    assert_logits_of_their_own_code(model, lengths, counting, monkeypatch)


def test_quantised_keys_that_are_too_wide_for_the_kernel_are_left_to_the_layers_own_code(counting):
    model = made(llama, {"num_attention_heads": 4, "head_dim": 320}, FORMATS["float32"])
    quantize_kv(model, KVFormat(8, 32))
    steps(model, [5, 40])
    assert not counting.layers


LEFT = {
    "half of a head is turned": ("llama", {}, lambda layer: setattr(layer.self_attn.rope, "dims", 8)),
    "pairs are neighbours": ("llama", {"rope_traditional": True}, None),
    "norms that differ": ("llama", {}, lambda layer: setattr(layer.input_layernorm, "eps", 1e-3)),
    "norms of 16 bits": ("llama", {}, lambda layer: layer.input_layernorm.set_dtype(mx.float16)),
    "an adapter": ("llama", {}, lambda layer: setattr(layer.mlp, "up_proj", Doubled(layer.mlp.up_proj))),
}


@pytest.mark.parametrize(("layers", "is_used"), [(cpu_decoder._LEAST - 1, False), (cpu_decoder._LEAST, True)])
def test_steps_that_are_prepared_ahead_write_in_place(layers, is_used):
    model = made(llama, {"num_hidden_layers": layers}, FORMATS["float32"])
    assert isinstance(model.layers[0], cpu_decoder._Layer) == is_used
    batch = SlotCache(model)
    batch.join([filled(model, 5), filled(model, 6)])
    batch.make_room(8000)
    tokens = mx.zeros((2,), dtype=mx.uint32)
    mx.eval(batch.advance(tokens))
    mx.reset_peak_memory()
    before, slots = mx.get_active_memory(), 2 * 2 * 16 * 8000 * 4
    for _ in range(30):
        coming = mx.argmax(batch.advance(tokens), axis=-1).astype(mx.uint32)
        mx.async_eval(coming)
        mx.eval(tokens)
        tokens = coming
    mx.eval(tokens)
    assert mx.get_peak_memory() - before < slots


def test_steps_that_are_prepared_ahead_write_to_quantised_slots_in_place():
    model = made(llama, {"num_hidden_layers": cpu_decoder._LEAST, "head_dim": 32}, FORMATS["float32"])
    quantize_kv(model, KVFormat(8, 32))
    batch = SlotCache(model)
    batch.join([filled(model, 5), filled(model, 6)])
    batch.make_room(8000)
    tokens = mx.zeros((2,), dtype=mx.uint32)
    mx.eval(batch.advance(tokens))
    mx.reset_peak_memory()
    before, words = mx.get_active_memory(), 2 * 2 * 32 * 8000
    for _ in range(30):
        coming = mx.argmax(batch.advance(tokens), axis=-1).astype(mx.uint32)
        mx.async_eval(coming)
        mx.eval(tokens)
        tokens = coming
    mx.eval(tokens)
    assert mx.get_peak_memory() - before < words


class Doubled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, x):
        return 2 * self.layer(x)


@pytest.mark.parametrize(("name", "fields", "change"), LEFT.values(), ids=LEFT)
def test_layers_of_another_form_are_left_to_their_own_code(name, fields, change, counting):
    model = random_model(name, **fields)
    cpu_layers.replace_functions()
    cpu_layers.replace_layers(model)
    for layer in model.layers if change else ():
        change(layer)
    cpu_decoder.replace_layers(model)
    expected = model(mx.array([[3, 1, 4]]))[:, -1]
    batch = SlotCache(model)
    batch.join([filled_with(model, [3, 1])])
    assert mx.allclose(batch.advance(mx.array([4], dtype=mx.uint32)), expected, atol=1e-4)
    assert not counting.layers


def filled_with(model, tokens):
    cache = caches.new_cache(model)
    model(mx.array([tokens]), cache=cache)
    return cache


def test_layers_with_a_window_are_left_to_their_own_code(counting):
    kinds = ["sliding_attention", "full_attention"] * 2
    model = random_model("llama", layer_types=kinds, sliding_window=8)
    cpu_layers.replace_layers(model)
    cpu_decoder.replace_layers(model)
    assert [isinstance(layer, cpu_decoder._Layer) for layer in model.layers] == [False, True] * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_only_architectures_of_this_form_have_it(name, counting):
    """Those whose code is equal to that of Llama or Qwen 3."""
    model = random_model(name)
    cpu_layers.replace_functions()
    cpu_layers.replace_layers(model)
    cpu_decoder.replace_layers(model)
    known = {
        type(layer).__module__.rpartition(".")[2] for layer in model.modules() if isinstance(layer, cpu_decoder._Layer)
    }
    assert known <= {"llama", "qwen2", "qwen3"}


def test_shapes_that_do_not_fit_are_refused():
    x, weight, norm = mx.zeros((1, 1, 64)), mx.zeros((64, 64)), mx.ones((64,))
    slots = (mx.zeros((1, 4, 32, 16)), mx.zeros((1, 4, 32, 16)), mx.zeros((1,), dtype=mx.int32), 1)
    turns = mx.ones((1, 1, 1, 1, 8)), mx.zeros((1, 1, 1, 2, 8))
    layers, sizes = [(0, 0, False, [weight])] * 7, (4, 4, 16, 0.25, 1e-5)
    assert native().decoder_layer(x, layers, [norm, norm], *turns, [slots], *sizes)[0].shape == x.shape
    for wrong in (
        (x, layers[:6], [norm, norm], *turns, [slots], *sizes),
        (x, layers, [norm], *turns, [slots], *sizes),
        (x, layers, [norm, norm], *turns, [slots, slots], *sizes),
        (x[:0], layers, [norm, norm], *turns, [], *sizes),
        (x, layers, [norm, norm], *turns, [(*slots[:3], 2)], *sizes),
        (x, layers, [norm, norm], *turns, [slots], 4, 4, 8, 0.25, 1e-5),
        (x, [(0, 0, False, [weight[:32]]), *layers[1:]], [norm, norm], *turns, [slots], *sizes),
        (x[:, :, :32], layers, [norm, norm], *turns, [slots], *sizes),
        (x, layers, [norm, norm[:8]], *turns, [slots], *sizes),
        (x, layers, [norm, norm], turns[0][..., :4], turns[1], [slots], *sizes),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            native().decoder_layer(*wrong)
