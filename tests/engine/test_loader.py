import gc
import json
import logging
import math
import shutil
import threading
from pathlib import Path

from mlxserver.engine.mlx import mx

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_model

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.loader import context_length, generation_defaults, load, read_tokenizer
from mlxserver.engine.loading.metadata import attention_heads, model_arguments, read_config
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import CPU
from tests.support.architectures import BASE, CONFIGS
from tools.harness.models import tiny_llama
from tools.harness.tiny_gguf import CONTEXT, write_tiny_gguf

THINK_ADAPTER = str(Path(__file__).parent.parent.parent / "mlxserver" / "adapters" / "smollm2-think")
LORA = {"rank": 2, "dropout": 0.0, "scale": 20.0}


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A tiny llama as an MLX directory."""
    directory = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLX_SERVER_CACHE", str(directory))
        return sources.resolve(str(write_tiny_gguf(directory / "tiny.gguf")))


@pytest.fixture
def tiny(converted, tmp_path):
    """A copy of the tiny llama, to be changed."""
    return shutil.copytree(converted, tmp_path / "tiny")


def write_adapter(model_directory, adapter, *, rank=2):
    """A random adapter for both layers of the tiny llama."""
    model, _ = load_model(model_directory)
    model.freeze()
    linear_to_lora_layers(model, 2, {**LORA, "rank": rank})
    adapter.mkdir()
    weights = {name: mx.random.normal(array.shape) for name, array in tree_flatten(model.trainable_parameters())}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    (adapter / "adapter_config.json").write_text(json.dumps({"num_layers": 2, "lora_parameters": LORA}))
    return adapter


def logits(model):
    return model(mx.array([[5, 6, 7, 8]]))


def quantize(directory):
    model, config = load_model(directory)
    model.set_dtype(mx.float16)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    for file in directory.glob("model*"):
        file.unlink()
    save_model(directory, model, donate_model=False)
    (directory / "config.json").write_text(json.dumps(config))


def test_a_loaded_model_states_its_facts(tiny):
    (tiny / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "presence_penalty": 1, "do_sample": true}'
    )
    reports = []
    loaded = load(ModelSpec("tiny", str(tiny)), progress=lambda *report: reports.append(report))
    parameters = [array for _, array in tree_flatten(loaded.model.parameters())]
    assert loaded.path == tiny
    assert loaded.context_length == CONTEXT
    assert loaded.generation_defaults == {"temperature": 0.6, "top_k": 20, "presence_penalty": 1.0}
    assert loaded.weight_bytes == sum(array.nbytes for array in parameters)
    assert loaded.config["model_type"] == "llama"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hé ab")) == "hé ab"
    assert [stage for stage, _, _ in reports] == ["reading", "reading"]
    assert reports[-1][1] == reports[-1][2] > 0


def test_a_context_length_in_the_spec_wins(tiny):
    assert load(ModelSpec("tiny", str(tiny), context_length=64)).context_length == 64


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 10}, 10),
        ({"n_ctx": 11}, 11),
        ({"text_config": {"max_position_embeddings": 12}}, 12),
        ({"max_position_embeddings": None, "n_positions": 13}, 13),
        ({"max_position_embeddings": "many"}, 4096),
        ({"text_config": None}, 4096),
    ],
)
def test_the_context_length_is_found_where_configs_have_it(config, expected, caplog):
    with caplog.at_level(logging.WARNING, "engine"):
        assert context_length("key", config) == expected
    assert ("key: its config.json states no context length" in caplog.text) == (expected == 4096)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"temperature": "hot", "top_p": true, "min_p": null}', '{"top_k": 2.5, "repetition_penalty": 0}'],
)
def test_a_generation_config_without_usable_values_is_ignored(text, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    assert generation_defaults(tmp_path) == {}


@pytest.mark.skipif(not device.is_cpu(), reason="a GPU keeps the weights as they are")
def test_on_a_cpu_quantized_weights_become_float32(tiny):
    quantize(tiny)
    model = load(ModelSpec("tiny", str(tiny)), policy=CPU).model
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float32}
    assert not [layer for layer in model.modules() if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)]


@pytest.mark.skipif(not device.is_cpu(), reason="a GPU keeps quantized layers beside their adapter")
@pytest.mark.parametrize("is_quantized", [False, True])
def test_an_adapter_is_fused_into_the_weights_and_changes_the_model(tiny, tmp_path, is_quantized):
    adapter = write_adapter(tiny, tmp_path / "adapter")
    if is_quantized:
        quantize(tiny)
    plain = load(ModelSpec("tiny", str(tiny)), policy=CPU)
    adapted = load(ModelSpec("adapted", str(tiny), adapter=str(adapter)), policy=CPU)
    assert adapted.weight_bytes == plain.weight_bytes
    assert not mx.allclose(logits(adapted.model), logits(plain.model), atol=0.1)


@pytest.mark.skipif(not device.is_cpu(), reason="a GPU keeps the weights as they are")
@pytest.mark.parametrize(("mode", "group_size"), [("affine", 32), ("mxfp4", 32)])
def test_on_a_cpu_quantized_weights_are_not_rounded_again(tiny, mode, group_size):
    """Scales of 16 bits are made float32 before the weights are computed from them, not after."""
    model, config = load_model(tiny)
    model.set_dtype(mx.bfloat16)
    model, config = quantize_model(model, config, group_size=group_size, bits=4, mode=mode)
    for file in tiny.glob("model*"):
        file.unlink()
    save_model(tiny, model, donate_model=False)
    (tiny / "config.json").write_text(json.dumps(config))
    layer = model.layers[0].mlp.gate_proj
    scales, biases = (None if array is None else array.astype(mx.float32) for array in (layer.scales, layer.biases))
    exact = mx.dequantize(
        layer.weight, layer.scales if mode == "mxfp4" else scales, biases, group_size, 4, mode, dtype=mx.float32
    )
    loaded = load(ModelSpec("tiny", str(tiny)), policy=CPU).model
    assert mx.array_equal(loaded.layers[0].mlp.gate_proj.weight, exact)


def test_an_embedded_model_gets_its_makers_sampling():
    """At temperature 1 the small model rambles until its context is full."""
    assert load(ModelSpec("small", "embedded:smollm2")).generation_defaults == {"temperature": 0.2, "top_p": 0.9}


def test_a_model_loads_on_a_thread_of_its_own(tiny):
    outcome = []

    def work():
        outcome.append(logits(load(ModelSpec("tiny", str(tiny))).model).shape)
        mx.clear_streams()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [(1, 4, 261)]


def without(name):
    return lambda model: (model / name).unlink()


def with_config(**changes):
    def change(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


def half_of(name):
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:5000])


WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (without("config.json"), "no config.json"),
        (without(WEIGHTS), "No safetensors found"),
        (without("tokenizer.json"), "the tokenizer in .* can't be read"),
        (half_of(WEIGHTS), "the model in .* can't be read: .*safetensors"),
        (half_of("tokenizer.json"), "the tokenizer in .* can't be read"),
        (lambda model: (model / "config.json").write_text("{"), "can't be read: Expecting property name"),
        (lambda model: (model / "config.json").write_text("{}"), "can't be read: KeyError 'model_type'"),
        (with_config(model_type="martian"), "Model type martian not supported"),
        (with_config(num_hidden_layers=3), "Missing .* parameters"),
        (with_config(hidden_size=32), "Expected shape"),
        (with_config(model_file="evil.py"), "custom module"),
    ],
)
def test_a_damaged_model_fails_with_its_cause_and_leaves_no_memory(tiny, damage, cause):
    load(ModelSpec("warm", str(tiny)))
    gc.collect()
    before = device.active_bytes()
    damage(tiny)
    with pytest.raises(LoadFailed, match=cause) as caught:
        load(ModelSpec("tiny", str(tiny)))
    assert str(caught.value).startswith("Model 'tiny' could not be loaded: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None
    assert device.active_bytes() == before


def empty(adapter):
    for file in adapter.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (shutil.rmtree, "does not exist"),
        (empty, "adapter_config.json"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{}"), "num_layers"),
        (lambda adapter: (adapter / "adapters.safetensors").write_bytes(b"x" * 40), "safetensors"),
    ],
)
def test_a_damaged_adapter_fails_with_its_cause(tiny, tmp_path, damage, cause):
    adapter = write_adapter(tiny, tmp_path / "adapter")
    damage(adapter)
    with pytest.raises(LoadFailed, match=f"the adapter .*/adapter' can't be used with this model: .*{cause}"):
        load(ModelSpec("tiny", str(tiny), adapter=str(adapter)))


def test_an_adapter_of_another_shape_fails_with_the_tensor(tiny, tmp_path):
    adapter = write_adapter(tiny, tmp_path / "adapter", rank=4)
    with pytest.raises(LoadFailed, match="adapter shape .* does not match"):
        load(ModelSpec("tiny", str(tiny), adapter=str(adapter)))


def test_an_adapter_for_another_model_fails(tiny):
    with pytest.raises(LoadFailed, match="can't be used with this model"):
        load(ModelSpec("tiny", str(tiny), adapter=THINK_ADAPTER))


def test_a_source_that_does_not_exist_fails_with_its_name():
    with pytest.raises(LoadFailed, match="Model 'x' could not be loaded: Model source '/nowhere': there is no such"):
        load(ModelSpec("x", "/nowhere"))


def greedy(loaded, question, limit=120):
    messages = [{"role": "user", "content": question}]
    prompt = mx.array(loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    tokens = []
    for token, _ in generate_step(prompt, loaded.model, max_tokens=limit):
        if token in loaded.tokenizer.eos_token_ids:
            break
        tokens.append(token)
    return loaded.tokenizer.decode(tokens)


def test_the_think_adapter_makes_the_embedded_model_reason_before_it_answers():
    loaded = load(ModelSpec("smollm2-think", "embedded:smollm2", type="thinking", adapter=THINK_ADAPTER))
    reasoning, answer = greedy(loaded, "What is 17 + 25?").removeprefix("<think>").split("</think>")
    assert reasoning.strip()
    assert "42" in answer
    assert loaded.context_length == 8192


def test_the_think_adapter_is_small_and_names_no_path():
    files = {path.name: path for path in Path(THINK_ADAPTER).iterdir()}
    assert set(files) == {"adapters.safetensors", "adapter_config.json"}
    assert files["adapters.safetensors"].stat().st_size < 4_000_000
    assert "/" not in files["adapter_config.json"].read_text()


def test_a_thread_keeps_no_words_of_a_tokenizer(tmp_path):
    """Each of these loads would otherwise leave some 2 MiB in the thread."""
    spec = ModelSpec("tiny", str(tiny_llama(tmp_path / "tiny")))
    text = " ".join(f"word{n}" for n in range(10_000))
    sizes = []
    for _ in range(9):
        assert load(spec).tokenizer.encode(text)
        gc.collect()
        sizes.append(device.process_bytes())
    assert sizes[-1] - sizes[2] < 4 << 20


def rewrite_config(directory, **changes):
    """Change some keys of a config.json."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def built(config):
    model_class, arguments = _get_classes(config)
    return model_class(arguments.from_dict(config))


def test_tagged_floats_of_a_config_are_numbers(tmp_path):
    text = '{"a": [0.0, {"__float__": "Infinity"}], "b": {"__float__": "-Infinity", "c": 1}, "d": {"__float__": "x"}}'
    (tmp_path / "config.json").write_text(text)
    config = read_config(tmp_path / "config.json")
    assert config == {"a": [0.0, math.inf], "b": {"__float__": "-Infinity", "c": 1}, "d": {"__float__": "x"}}


def test_a_model_with_a_tagged_float_is_estimated(tmp_path):
    config = CONFIGS["nemotron_h"] | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "nemotron_h"} | config))
    assert estimate(ModelSpec("m", str(tmp_path))).weights > 0


@pytest.mark.parametrize(
    ("stated", "context", "heads"),
    [
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, 32768, 4),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "deepseek_v3"}}, 2048, 4),
    ],
)
def test_a_models_own_arguments_state_what_its_config_leaves_out(stated, context, heads):
    parts = CONFIGS["kimi_k25"]["text_config"] if stated["model_type"] == "kimi_k25" else BASE
    left_out = ("max_position_embeddings", "num_attention_heads")
    text = {key: value for key, value in parts.items() if key not in left_out} | stated["text_config"]
    config = {**stated, "text_config": text, "vocab_size": 300}
    arguments = [*model_arguments(built(config))]
    assert context_length("key", config, *arguments) == context
    assert attention_heads(config, *arguments) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "kimi_k2", "rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1}},
        {"model_type": "gear", "layer_types": ["conv_mixer", "sliding_attention"]},
    ],
)
def test_a_tokenizer_is_read_where_transformers_refuses_the_configuration(tiny, changes):
    whole = load(ModelSpec("tiny", str(tiny))).tokenizer
    rewrite_config(tiny, **changes)
    own = read_tokenizer(tiny)
    assert own.encode("hé ab") == whole.encode("hé ab")
    assert own.chat_template == whole.chat_template


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [("olmo", "needs the Python package 'hf_olmo', which is not installed"), ("bitnet", "needs Metal")],
)
def test_what_the_environment_lacks_for_a_model_is_named_in_one_line(tiny, model_type, missing):
    rewrite_config(tiny, model_type=model_type)
    with pytest.raises(LoadFailed, match=f"could not be loaded: its architecture {missing}"):
        estimate(ModelSpec("tiny", str(tiny)))


def test_a_missing_package_fails_the_load_and_not_the_process(tiny):
    rewrite_config(tiny, model_type="olmo")
    with pytest.raises(LoadFailed, match="needs the Python package 'hf_olmo'"):
        load(ModelSpec("tiny", str(tiny)))
