"""The format of weights is measured by the products of each shape; the next load of the shape follows, where it may."""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

from mlxserver.engine.mlx import mx, nn

import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_api_server import engine_starter
from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.loading import loader, sources
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.kept_choices import WEIGHTS, Choice, KeptChoices
from mlxserver.engine.loading.quantized_products import quantized_products
from mlxserver.engine.platform import device, streams
from mlxserver.engine.platform.policy import CPU, WeightPolicy
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.runners.measured_policies import ROUNDS, Result
from mlxserver.engine.runners.measured_weights import WeightMeasurement
from mlxserver.engine.runners.model_policy import choice_name, weights_name
from mlxserver.engine.worker.runner import PAUSE
from mlxserver.engine.worker.thread_pool import ThreadPool
from model_manager import ModelManager
from tests.support.architectures import CONFIGS, MORE_CONFIGS, write_random_model
from tests.support.measurements import Clock, granted, refused
from tests.support.scripted_engine import until, within_deadline

GPU = replace(
    CPU, weights=WeightPolicy.STORED, widen_weights="without_experts", replace_kernels=False, candidates=(WEIGHTS,)
)
FASTER, SLOWER = ([1.0] * 3 + [own] * 3 for own in (0.5, 4.0))  # 16 bits, for each number of tokens
CONFIGURATIONS = CONFIGS | MORE_CONFIGS
SMALL = {  # MLX's products of other types than float32 are slow on a CPU
    **{"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}


def quantized_model(path, kind="llama", mode="affine", **config):
    """The directory of a tiny model in 4 bits."""
    config = {"model_type": kind} | CONFIGURATIONS[kind] | (SMALL if kind == "llama" else {}) | config
    model, config = load_model(write_random_model(path, config))
    model.set_dtype(mx.bfloat16)
    model, config = quantize_model(model, config, 32, 4, mode=mode)
    save_model(path, model)
    save_config(config, path / "config.json")
    return path


class Loads:
    """Loads of one quantized model by a process of its own each, whose choices are kept in a folder."""

    def __init__(self, folder, kind="llama"):
        self.spec = ModelSpec("m", str(quantized_model(folder / "m", kind)), max_running=2)
        self.kept = KeptChoices(folder / "policies")
        self.folder = folder / "policies"

    def builder(self, clock=None, device=GPU, is_measuring=True):
        return Builder(10.0, policy=device, kept_choices=self.kept if is_measuring else None, clock=clock or Clock(1.0))

    def load(self, clock, device=GPU, **fields):
        """The facts of a load, and its idle steps."""
        runner = self.builder(clock, device).build(replace(self.spec, **fields))
        steps = list(runner.idle_steps)
        runner.batch.close()
        return runner.facts.policy, steps

    def widened(self, device=GPU, is_measuring=True, **fields):
        """What the estimate of the next load says of 16 bits."""
        spec = replace(self.spec, **fields)
        policy = self.builder(device=device, is_measuring=is_measuring).policies.for_estimate(spec)
        return estimate(spec, policy).widened

    def name(self, naming=weights_name, **fields):
        spec = replace(self.spec, **fields)
        return naming(spec, sources.checkpoint_metadata(spec.source).config, GPU)

    def know(self, is_wide):
        """What a measurement would leave."""
        self.kept.store(self.name(), Choice("a model", "a machine", {WEIGHTS: is_wide}, {WEIGHTS: 2.0}))

    @property
    def choice(self):
        return self.kept.find(self.name())

    @property
    def wide_bytes(self):
        return loader.load(replace(self.spec, weights="bfloat16"), policy=GPU).weight_bytes


@pytest.fixture
def loads(tmp_path):
    return Loads(tmp_path)


WIDE = {"weights": "bfloat16", "is_widened": True}  # of a spec for which the manager has found room


@pytest.mark.parametrize("form", [{}, WIDE])
def test_the_next_load_is_wide_where_16_bits_were_faster_whatever_it_is_now(loads, form):
    facts, steps = loads.load(Clock(*FASTER), **form)
    assert (facts.measured, set(steps)) == ((), {"stored", "16 bits"})
    assert (loads.choice.fields, loads.choice.speedups) == ({WEIGHTS: True}, {WEIGHTS: pytest.approx(2)})
    assert loads.widened() == loads.wide_bytes
    facts, steps = loads.load(Clock(*SLOWER), **WIDE)
    assert (facts.weights, facts.measured, facts.fixed, steps) == ("bfloat16", ("weights",), (), [])


@pytest.mark.parametrize("form", [{}, WIDE])
def test_the_next_load_is_as_stored_where_that_was_faster_whatever_it_is_now(loads, form):
    assert loads.widened() == loads.wide_bytes  # by the rule of the device
    loads.load(Clock(*SLOWER), **form)
    assert (loads.choice.fields, loads.choice.speedups) == ({WEIGHTS: False}, {WEIGHTS: pytest.approx(4)})
    assert loads.widened() == 0
    facts, steps = loads.load(Clock(*FASTER))
    assert (facts.weights, facts.measured, facts.fixed, steps) == ("stored", ("weights",), (), [])


def test_a_model_that_is_wide_by_measurement_may_still_be_loaded_as_stored(loads):
    loads.know(True)
    facts, _ = loads.load(Clock(1.0))  # there was no room for more
    assert (facts.weights, facts.measured) == ("stored", ())


def test_experts_are_widened_where_that_was_measured(tmp_path):
    loads = Loads(tmp_path, "qwen3_moe")
    assert loads.widened() == 0
    loads.know(True)
    assert loads.widened() == loads.wide_bytes


def test_a_format_that_the_device_cannot_compute_is_left_and_not_tried_again(tmp_path, caplog):
    loads = Loads(tmp_path, "qwen3_moe")
    _, steps = loads.load(Clock(1.0))
    assert steps[-1] == "stored"  # MLX has no grouped products of 16 bits on a CPU
    assert "m: widen_weights is dropped: RuntimeError: " in caplog.text
    assert (loads.choice.fields, loads.choice.speedups) == ({}, {WEIGHTS: 0.0})
    assert (loads.widened(), loads.load(Clock(1.0))[1]) == (0, [])


@pytest.mark.parametrize("weights", ["stored", "bfloat16", "float32"])
def test_a_setting_fixes_the_format_whatever_was_measured(loads, weights):
    _, steps = loads.load(Clock(*FASTER), weights=weights)
    assert (steps, loads.choice) == ([], None)
    loads.know(True)
    facts, _ = loads.load(Clock(*FASTER), weights=weights)
    assert (facts.weights, facts.fixed, facts.measured) == (weights, ("weights",), ())
    assert loads.widened(weights=weights) == 0


def test_nothing_is_known_where_nothing_is_measured(loads):
    loads.know(False)
    assert loads.widened(is_measuring=False) == loads.wide_bytes
    assert loads.widened(replace(GPU, candidates=())) == loads.wide_bytes
    assert loads.load(Clock(*SLOWER), replace(GPU, candidates=()))[1] == []


def test_a_model_of_16_bits_has_nothing_to_measure(tmp_path):
    loads = Loads(tmp_path)
    write_random_model(tmp_path / "m", {"model_type": "llama"} | CONFIGURATIONS["llama"] | SMALL)
    assert loads.load(Clock(*FASTER))[1] == []


WHOLE = {"form": 1, "model": "m", "device": "d", "fields": {WEIGHTS: False}, "speedups": {WEIGHTS: 2.0}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        WHOLE | {"form": 2},
        WHOLE | {"fields": {WEIGHTS: "always"}},
        WHOLE | {"fields": {WEIGHTS: 1}},
        WHOLE | {"fields": {"weights": True}},
        WHOLE | {"speedups": {WEIGHTS: float("nan")}},
        WHOLE | {"fields": {"pad_slots": True}, "speedups": {"pad_slots": 2.0}},
    ],
)
def test_a_damaged_or_foreign_file_leaves_the_rule_of_the_device_and_is_measured_anew(loads, content):
    loads.folder.mkdir()
    (loads.folder / f"{loads.name()}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert loads.widened() == loads.wide_bytes
    runner = loads.builder().build(loads.spec)
    assert (runner.facts.policy.pad_slots, runner.facts.policy.measured) == (False, ())
    assert next(runner.idle_steps) == "stored"
    assert loads.choice.fields.get(WEIGHTS) is None
    runner.batch.close()


def test_the_format_in_a_file_of_other_candidates_is_left_out(loads):
    loads.folder.mkdir()
    (loads.folder / f"{loads.name(choice_name)}.json").write_text(json.dumps(WHOLE))
    assert loads.widened() == loads.wide_bytes
    loads.know(True)
    assert loads.load(Clock(1.0), **WIDE)[0].measured == ("weights",)


def test_the_name_is_the_same_whatever_format_is_loaded(loads):
    names = [loads.name(), loads.name(**WIDE), loads.name(kv_bits=8), loads.name(policy={"pad_slots": True})]
    assert len(set(names)) == 1
    config = sources.checkpoint_metadata(loads.spec.source).config
    others = {weights_name(loads.spec, config | {"hidden_size": 128}, GPU), loads.name(choice_name)}
    others.add(weights_name(loads.spec, config, GPU, "another version"))
    assert len({names[0], *others}) == 4


def test_a_choice_is_shown_in_one_line(loads):
    loads.know(True)
    assert str(loads.choice) == "a model: widen_weights on, 2.00 times as fast"
    loads.know(False)
    assert str(loads.choice) == "a model: widen_weights off, 2.00 times as fast"


@within_deadline
async def test_a_server_loads_what_was_measured_and_its_settings_stay(loads):
    threads = ThreadPool(streams.thread_stream)
    builder = loads.builder(Clock(*FASTER), replace(GPU, widen_weights="never"))
    manager = ModelManager(
        Settings(models=(loads.spec,), memory_limit=1 << 30),
        engine_starter(builder, threads),
        device.process_bytes,
        lambda spec: threads.call(lambda: estimate(spec, builder.policies.for_estimate(spec))),
    )
    instance, seen = manager.instance("m"), []
    try:
        for _ in range(2):
            await instance.load()
            seen.append((instance.facts.policy.weights, instance.facts.policy.measured, instance.spec.weights))
            await until(lambda: loads.choice and loads.choice.speedups.get(WEIGHTS))
            await instance.unload("drain")
    finally:
        await manager.close(0)
        threads.close()
    assert seen == [("stored", (), "auto"), ("bfloat16", ("weights",), "auto")]


# -- products -------------------------------------------------------------------------------------------------------


def arrays_in(model, kinds):
    layers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    return sum(array.nbytes for layer in layers for name, array in tree_flatten(layer.parameters()) if name != "bias")


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_products_are_those_of_the_checkpoint_in_both_formats(tmp_path, mode, is_tied):
    path = quantized_model(tmp_path / "m", mode=mode, tie_word_embeddings=is_tied)
    stored = loader.load(ModelSpec("m", str(path)), policy=GPU)
    wide = loader.load(ModelSpec("m", str(path), weights="bfloat16"), policy=GPU)
    assert stored.products == wide.products
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding) if is_tied else nn.QuantizedLinear
    sizes = {each: sum(n * own.bytes(each) for own, n in stored.products.items()) for each in (False, True)}
    assert sizes[False] == arrays_in(stored.model, kinds)
    assert sizes[True] == arrays_in(wide.model, (nn.Linear, nn.Embedding) if is_tied else nn.Linear)
    assert sum(stored.products.values()) == 7 + 1
    assert len(stored.products) == 5  # queries and outputs; keys and values; gate and up; down; the head


def test_a_token_meets_some_of_the_experts(tmp_path):
    loaded = loader.load(ModelSpec("m", str(quantized_model(tmp_path / "m", "qwen3_moe"))), policy=GPU)
    experts = [product for product in loaded.products if product.active]
    assert {product.active for product in experts} == {2}
    assert {product.shape[0] for product in experts} == {4}
    loaded.model.args.num_experts_per_tok = None
    assert quantized_products(loaded.model) == Counter()  # how many is not known


# -- one measurement ------------------------------------------------------------------------------------------------


@pytest.fixture
def products(tmp_path):
    """Those of a model with experts, in types that MLX computes with on a CPU."""
    loaded = loader.load(ModelSpec("m", str(quantized_model(tmp_path / "m", "qwen3_moe"))), policy=GPU)
    return {replace(product, half=mx.float32): count for product, count in loaded.products.items()}


def measurement(products, clock, results, borrowing=granted, is_quiet=lambda: True):
    return WeightMeasurement("m", products, borrowing=borrowing, is_quiet=is_quiet, keep=results.append, clock=clock)


def test_every_shape_is_computed_in_both_formats_in_turns_with_experts_too(products):
    results = []
    steps = list(measurement(products, Clock(*FASTER), results).steps())
    assert steps == ["stored", "16 bits"] * len(products) * ROUNDS
    assert results[-1] == Result({WEIGHTS: True}, {WEIGHTS: pytest.approx(2)})


def test_16_bits_that_are_not_faster_by_a_margin_do_not_take_the_memory(products):
    product, results = next(iter(products)), []
    list(measurement({product: 1}, Clock(*[1.0] * 3, *[0.96] * 3), results).steps())
    assert results[-1] == Result({WEIGHTS: False}, {WEIGHTS: pytest.approx(0.96)})


def test_short_samples_are_of_several_passes(products):
    results = []
    product = next(iter(products))
    list(measurement({product: 1}, Clock(0.001, 0.016), results).steps())  # one pass, then sixteen
    assert results[-1] == Result({WEIGHTS: False}, {WEIGHTS: pytest.approx(1)})


def test_products_count_as_often_as_a_step_has_them(products):
    one, other = list(products)[:2]
    durations = [1.0] * 3 + [0.5] * 3 + [1.0] * 3 + [2.0] * 3  # of the one, and of the other
    for counts, is_wide in (({one: 9, other: 1}, True), ({one: 1, other: 9}, False)):
        results = []
        passes = [own * number_of(counts, product) for product, own in by_product(counts, durations)]
        list(measurement(counts, Clock(*passes), results).steps())
        assert results[-1].fields == {WEIGHTS: is_wide}


def by_product(counts, durations):
    each = len(durations) // len(counts)
    return [(product, own) for n, product in enumerate(counts) for own in durations[n * each : (n + 1) * each]]


def number_of(counts, product):
    """Weights that a sample of so small a model has: as many as make up its size."""
    total = sum(count * own.bytes(is_wide=False) for own, count in counts.items())
    return -(-total // product.bytes(is_wide=False))


def test_what_is_borrowed_is_the_weights_of_a_sample(products):
    asked = []

    @contextmanager
    def borrowing(bytes):
        asked.append(bytes)
        yield True

    product = next(iter(products))
    list(measurement({product: 3}, Clock(*FASTER), [], borrowing).steps())
    assert asked == [3 * product.bytes(is_wide=False), 3 * product.bytes(is_wide=True)] * ROUNDS


def test_without_memory_nothing_is_measured_and_nothing_is_known(products):
    results = []
    assert list(measurement(products, Clock(1.0), results, refused).steps()) == []
    assert results[-1] == Result({}, {})


def test_16_bits_that_are_faster_now_and_then_are_left_for_another_load(products):
    product, results = next(iter(products)), []
    durations = FASTER * (ROUNDS - 1) + [1.0] * 3 + [2.0] * 3
    list(measurement({product: 1}, Clock(*durations), results).steps())
    assert results[-1] == Result({}, {})


def test_a_sample_beside_another_model_is_taken_again(products):
    quiet = iter([True, False, False])
    work = measurement(products, Clock(1.0), [], is_quiet=lambda: next(quiet, True)).steps()
    assert [next(work) for _ in range(5)] == ["stored", PAUSE, PAUSE, "16 bits", "stored"]


def test_a_sample_that_ends_the_process_is_not_tried_again(products):
    class End(BaseException):
        """As a crash: nothing that comes behind it is done."""

    def crash():
        raise End

    results = []
    with pytest.raises(End):
        next(measurement(products, crash, results).steps())
    assert results[-1] == Result({}, {WEIGHTS: 0.0})


def test_an_unload_in_the_middle_leaves_what_was_known(products):
    results = []
    steps = measurement(products, Clock(*FASTER), results).steps()
    for _ in range(4):
        next(steps)
    steps.close()
    assert results[-1] == Result({}, {})
